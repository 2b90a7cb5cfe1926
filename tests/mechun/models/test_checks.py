"""What must hold before a number is believed: the checks pass on sound models and catch broken ones."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from mechun.errors import ModelError, UsageError
from mechun.models import checks
from mechun.models.checks import LAYER_HOOKS, check_hooks, check_model, pad_both_sides, run_plain, run_view
from mechun.models.loading import load_model
from mechun.models.view import LoadedModel
from tests.toys import FAMILIES, VOCAB, build_hf, make_tokenizer

Loaded = Callable[[str], LoadedModel]
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


def fresh(family: str) -> LoadedModel:
    return load_model(build_hf(family), tokenizer=make_tokenizer(), check=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_view_and_model_agree_however_the_batch_is_padded(loaded: Loaded, family: str):
    """Traps 1 and 4."""
    model = loaded(family)
    plain = run_plain(model, IDS, torch.ones_like(IDS, dtype=torch.bool))
    for _, ids, mask in pad_both_sides(IDS):
        assert (run_plain(model, ids, mask)[mask].view_as(plain) - plain).abs().max() < 1e-4
        assert (run_view(model.bridge, ids, mask)[mask].view_as(plain) - plain).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_add_up(loaded: Loaded, family: str):
    """Trap 2."""
    model = loaded(family)
    _, cache = model.bridge.run_with_cache(IDS, attention_mask=torch.ones_like(IDS))
    for layer in range(2):
        at = f"blocks.{layer}."
        parts = cache[f"{at}hook_resid_pre"] + cache[f"{at}hook_attn_out"] + cache[f"{at}hook_mlp_out"]
        assert torch.allclose(parts, cache[f"{at}hook_resid_post"], atol=1e-4)


@pytest.mark.parametrize("kind", ["Olmo2", "Mistral"])
def test_other_families_that_work(kind: str):
    shape = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = getattr(transformers, f"{kind}Config")(**shape, num_key_value_heads=2, max_position_embeddings=64)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    check_model(load_model(hf, tokenizer=make_tokenizer()))


def test_a_model_without_attention_is_refused():
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"cannot be (decomposed|looked into)"):
        load_model(transformers.MambaForCausalLM(config), tokenizer=make_tokenizer())


def test_an_architecture_the_bridge_does_not_know_is_refused():
    hf = build_hf("gpt2")
    hf.__class__ = type("Unheard", (type(hf),), {})
    hf.config.model_type = "unheard"
    with pytest.raises(ModelError, match=r"Unheard \(unheard\) cannot be looked into: Could not determine"):
        load_model(hf, tokenizer=make_tokenizer())


@pytest.mark.parametrize("hook", ["hook_attn_out", "hook_mlp_out"])
def test_layers_that_do_not_add_up_are_refused(hook: str):
    model = fresh("llama")
    bridge = model.bridge

    def run_scaled(*args: Any, **kwargs: Any) -> Any:
        logits, cache = bridge.run_with_cache(*args, **kwargs)
        return logits, {name: 1.01 * x if name == f"blocks.1.{hook}" else x for name, x in cache.items()}

    checks.check_sums(model, IDS)
    model._bridge = SimpleNamespace(cfg=bridge.cfg, run_with_cache=run_scaled)
    with pytest.raises(ModelError, match=r"layer 1 of LlamaForCausalLM does not add up: .* is off by"):
        checks.check_sums(model, IDS)


def test_a_view_that_is_off_is_refused():
    model = fresh("llama")
    with (
        model.bridge.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda x, hook: x * 1.01)]),
        pytest.raises(ModelError, match=r"the view of LlamaForCausalLM is off by .* with no padding"),
    ):
        check_model(model)
    check_model(model)


def test_a_view_that_ignores_the_mask_is_refused(monkeypatch: pytest.MonkeyPatch):
    def careless(bridge: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return bridge(ids, attention_mask=torch.ones_like(ids), return_type="logits")

    monkeypatch.setattr(checks, "run_view", careless)
    with pytest.raises(ModelError, match="with left padding"):
        check_model(fresh("gpt2"))


def test_a_missing_hook_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "LAYER_HOOKS", (*LAYER_HOOKS, "hook_soul"))
    with pytest.raises(ModelError, match=r"its view has no blocks\.0\.hook_soul"):
        check_model(fresh("gpt2"))


def test_a_typo_in_a_hook_name_is_refused(loaded: Loaded):
    """Trap 3."""
    model = loaded("gpt2")
    check_hooks(model, ["blocks.1.hook_mlp_out", "blocks.0.attn.hook_z"])
    for target in (model, model.bridge):
        with pytest.raises(UsageError, match=r"no hook 'blocks\.1\.hook_mlpout'.*did you mean blocks\.1\.hook_mlp_out"):
            check_hooks(target, ["blocks.1.hook_resid_pre", "blocks.1.hook_mlpout"])


def test_a_mixture_of_experts_has_no_neurons_to_hook():
    """Trap 12."""
    shape = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = transformers.MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64)
    model = load_model(transformers.MixtralForCausalLM(config), tokenizer=make_tokenizer())
    assert model.has_experts
    check_hooks(model, ["blocks.0.hook_mlp_out"])
    with pytest.raises(ModelError, match="mixtures of experts"):
        check_hooks(model, ["blocks.0.mlp.hook_post"])


def test_the_checks_leave_nothing_behind(loaded: Loaded):
    model = fresh("neox")
    before = model.measure_fingerprint()
    check_model(model)
    assert model.measure_fingerprint() == before
    assert all(p.grad is None and p.requires_grad for p in model.hf.parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.bridge.hook_dict.values())
