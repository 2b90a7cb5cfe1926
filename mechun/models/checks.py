"""What must hold before a number taken from a model is believed. Run once, at load, on a few random tokens.

1. The view's logits equal the plain model's.  2. Padding, left or right, changes nothing at the real positions.
3. resid_pre + attn_out + mlp_out = resid_post in every layer, else a circuit's edges would not add up to the model.
4. The hooks that the analyses need are there.  5. The logits are finite.
Traps: without a mask, left padding shifts positions silently; TransformerLens 3.9 ignores unknown hook names silently.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechun.errors import ModelError, UsageError, nearest
from mechun.models.view import LoadedModel

LAYER_HOOKS = (
    "hook_resid_pre",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
)
MODEL_HOOKS = ("hook_embed", "unembed.hook_in")
N_TOKENS = 10


def check_hooks(model: Any, names: Iterable[str]) -> None:
    """Refuse hook names that the model does not have; the bridge itself would ignore them.

    Args:
        model: A `LoadedModel`, or anything with a `hook_dict`.
        names: Names such as `blocks.3.hook_mlp_out`.

    Raises:
        UsageError: On an unknown name; the nearest valid ones are named.
        ModelError: On a request for neurons (`mlp.hook_pre`, `mlp.hook_post`) of a mixture of experts, which has none
            there.
    """
    experts = isinstance(model, LoadedModel) and model.has_experts
    known = (model.bridge if isinstance(model, LoadedModel) else model).hook_dict
    for name in names:
        if name not in known:
            raise UsageError(f"the model has no hook {name!r}", nearest(name, known, "hooks"))
        if experts and name.endswith(("mlp.hook_pre", "mlp.hook_post")):
            raise ModelError(f"{name!r} does not hold neurons: the MLPs are mixtures of experts", "use hook_mlp_out")


def check_model(model: LoadedModel, *, view: bool = True) -> None:
    """Refuse a model on which the project's numbers would be wrong.

    Args:
        model: The model to check.
        view: Also boot the view and compare it with the model; without it only vocabulary and finiteness are checked.

    Raises:
        ModelError: With the first reason found.
    """
    rows = model.n_embeddings
    # Added tokens do not count: many checkpoints have a padding token that no weight belongs to.
    if model.tokenizer.vocab_size > rows:
        known = model.tokenizer.vocab_size
        raise ModelError(f"the tokenizer knows {known} tokens, the model only {rows}", "they do not belong together")
    ids = torch.randint(
        0, rows, (2, min(N_TOKENS, model.context_length - 2)), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(model.device)
    plain = run_plain(model, ids, torch.ones_like(ids, dtype=torch.bool))
    if not plain.isfinite().all():
        raise ModelError(f"{model.name} gives logits that are not finite in {model.dtype}", "try --dtype float32")
    if view:
        check_view(model, ids, plain)


def check_view(
    model: LoadedModel, ids: Int[Tensor, "example pos"], plain: Float[Tensor, "example pos d_vocab"]
) -> None:
    """Refuse a model whose hooked view differs from it, or whose layers do not add up."""
    try:
        bridge = model.bridge
    except Exception as fault:  # the bridge raises whatever its adapter trips over
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0][:300]
        raise ModelError(f"{model.name} ({model.hf.config.model_type}) cannot be looked into: {reason}") from fault
    layers = [f"blocks.{layer}.{hook}" for layer in range(bridge.cfg.n_layers) for hook in LAYER_HOOKS]
    missing = [name for name in (*MODEL_HOOKS, *layers) if name not in bridge.hook_dict]
    if missing:
        raise ModelError(f"{model.name} cannot be decomposed: its view has no {missing[0]}")
    allowed = allowed_error(plain)
    for side, padded, mask in pad_both_sides(ids):
        if side == "left padding" and plain.dtype == torch.float64:
            continue  # rotary models take the softmax in float32, where a float64 mask is infinite: loudly not a number
        for what, logits in (("view", run_view(bridge, padded, mask)), ("model", run_plain(model, padded, mask))):
            error = (logits[mask].view_as(plain).float() - plain.float()).abs().max().item()
            if not error <= allowed:
                raise ModelError(
                    f"the {what} of {model.name} is off by {error:.1e} in its logits with {side}",
                    f"at most {allowed:.0e} is rounding",
                )
    check_sums(model, ids)


@torch.no_grad()
def check_sums(model: LoadedModel, ids: Int[Tensor, "example pos"]) -> None:
    """Refuse a model in which a layer's parts do not add up to its output."""
    parts = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    layers = range(model.bridge.cfg.n_layers)
    wanted = {f"blocks.{layer}.{part}" for layer in layers for part in parts}
    _, cache = model.bridge.run_with_cache(ids, attention_mask=torch.ones_like(ids), names_filter=lambda n: n in wanted)
    for layer in layers:
        before, attention, mlp, after = (cache[f"blocks.{layer}.{part}"].float() for part in parts)
        error = (before + attention + mlp - after).abs().max().item()
        claim = "resid_pre + attn_out + mlp_out = resid_post"
        if not error <= allowed_error(cache[f"blocks.{layer}.hook_resid_post"]):
            raise ModelError(
                f"layer {layer} of {model.name} does not add up: {claim} is off by {error:.1e}",
                "edges of its circuit would not sum to the model",
            )


def allowed_error(values: Float[Tensor, "..."]) -> float:
    """Largest rounding error to expect of values of this type and size: 1e-4 for numbers of order ten in float32."""
    scale = max(10.0, values.abs().max().item())
    return 1e-5 * scale if values.dtype in (torch.float32, torch.float64) else 8 * torch.finfo(values.dtype).eps * scale


def pad_both_sides(
    ids: Int[Tensor, "example pos"],
) -> list[tuple[str, Int[Tensor, "example padded"], Bool[Tensor, "example padded"]]]:
    """The same tokens without padding, with two pads on the left, and with two on the right, each with its mask."""
    pads, real = ids[:, :2].flip(0), torch.ones_like(ids, dtype=torch.bool)
    none = torch.zeros_like(pads, dtype=torch.bool)
    return [
        ("no padding", ids, real),
        ("left padding", torch.cat([pads, ids], 1), torch.cat([none, real], 1)),
        ("right padding", torch.cat([ids, pads], 1), torch.cat([real, none], 1)),
    ]


@torch.no_grad()
def run_plain(
    model: LoadedModel, ids: Int[Tensor, "example pos"], mask: Bool[Tensor, "example pos"]
) -> Float[Tensor, "example pos d_vocab"]:
    """Logits of the plain model, with positions counted from the first real token."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return model.hf(ids, attention_mask=mask.long(), position_ids=positions).logits


@torch.no_grad()
def run_view(
    bridge: Any, ids: Int[Tensor, "example pos"], mask: Bool[Tensor, "example pos"]
) -> Float[Tensor, "example pos d_vocab"]:
    """Logits of the hooked view."""
    return bridge(ids, attention_mask=mask.long(), return_type="logits")
