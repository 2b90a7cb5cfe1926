"""The small unlearning loop: one loop for every objective.

It trains a copy of the plain Hugging Face model and hands back the difference, so the model given is never touched and
the optimiser never sees a hooked view of it. Batches come from an explicit generator: forget facts in shuffled passes,
retain facts in shuffled passes of their own. Dropout stays off.

Trap: strength decides what a run can tell. Too few or too coarse steps leave all losses alike; too many saturate them
and wreck the retained facts. The default recipes were chosen between the two.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mechun.data.encoding import Encoded, encode_facts
from mechun.data.facts import Facts
from mechun.errors import DataError, ModelError
from mechun.models import LoadedModel
from mechun.unlearning.losses import Batch, take_batch
from mechun.unlearning.objectives import OBJECTIVES, Recipe, Stage, choose_recipe
from mechun.unlearning.outcome import Unlearned


def unlearn(
    model: LoadedModel,
    forget: Facts,
    retain: Facts | None = None,
    *,
    method: str = "npo",
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    **options: Any,
) -> Unlearned:
    """Make a model forget facts by a short training run, and hand back the change of its weights.

    Args:
        model: The model; it is left as it is.
        forget: Facts to remove.
        retain: Facts to keep; without any, the method runs without its retain term.
        method: Key of `OBJECTIVES`.
        steps: Optimiser steps; None for the method's own default, as for `lr` and `batch_size`.
        lr: Learning rate.
        batch_size: Forget facts per step.
        seed: Of batch order and random directions.
        on_step: Called after each step with its number from 1 and its logged quantities.
        options: Further fields of `Recipe`.

    Raises:
        UsageError: Unknown method.
        DataError: No forget fact can be encoded.
        ModelError: The run diverged.

    Cost: per step two forward and backward passes of `batch_size` facts, and the original's forward passes where the
    method needs a reference; memory of a second copy of the model and two more for the optimiser.

    Example:
        >>> unlearn(load_model("organism"), forget, retain, method="npo")  # doctest: +SKIP
        Unlearned(npo, 30 steps, change 1.4)
    """
    recipe = choose_recipe(method, steps=steps, lr=lr, batch_size=batch_size, seed=seed, **options)
    forgotten = encode_facts(forget, model.tokenizer, context_length=model.context_length)
    if not len(forgotten.facts):
        raise DataError("no fact to unlearn can be encoded", "see the reasons in the skipped facts")
    kept = encode_facts(retain, model.tokenizer, context_length=model.context_length) if retain else None
    delta, log = train(model.hf, forgotten, kept if kept is not None and len(kept.facts) else None, recipe, on_step)
    facts = {"forget": forget.fingerprint, "retain": retain.fingerprint if retain else ""}
    return Unlearned(delta, recipe, log, model.fingerprint, facts)


def train(
    original: PreTrainedModel,
    forget: Encoded,
    retain: Encoded | None,
    recipe: Recipe,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> tuple[dict[str, Tensor], tuple[Mapping[str, float], ...]]:
    """Train a copy of the model by the recipe; the change of each moved parameter and the log of the steps."""
    device = next(original.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    stage = _set_stage(original, recipe, generator)
    hf = copy.deepcopy(original).requires_grad_(True)
    optimiser = torch.optim.AdamW(hf.parameters(), lr=recipe.lr, weight_decay=0.0)
    forget_batches = _draw_batches(forget, recipe.batch_size, generator, device)
    retain_batches = _draw_batches(retain, recipe.batch_size, generator, device) if retain is not None else None
    log = []
    with torch.enable_grad():
        for step in range(1, recipe.steps + 1):
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr * min(1.0, step / (recipe.warmup + 1))
            batches = (next(forget_batches), next(retain_batches) if retain_batches else None)
            log.append(_take_step(hf, stage, optimiser, batches, step))
            if on_step:
                on_step(step, log[-1])
    old = dict(original.named_parameters())
    changes = {name: (new.detach() - old[name].detach()) for name, new in hf.named_parameters()}
    return {name: change for name, change in changes.items() if change.any()}, tuple(log)


def _take_step(
    hf: PreTrainedModel,
    stage: Stage,
    optimiser: torch.optim.Optimizer,
    batches: tuple[Batch, Batch | None],
    step: int,
) -> Mapping[str, float]:
    terms = OBJECTIVES[stage.recipe.method].function(hf, stage, *batches)
    optimiser.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), stage.recipe.clip)
    if not torch.isfinite(norm):
        raise ModelError(f"unlearning by {stage.recipe.method} diverged at step {step}", "lower its learning rate")
    optimiser.step()
    return {
        "step": float(step),
        **{name: float(term.detach()) for name, term in terms.items()},
        "grad_norm": float(norm),
    }


def _set_stage(original: PreTrainedModel, recipe: Recipe, generator: torch.Generator) -> Stage:
    config = original.config.get_text_config()
    layer = config.num_hidden_layers // 2 if recipe.layer is None else recipe.layer
    # Isotropic rather than the original's positive orthant: a layer norm would remove the common mean of the latter.
    direction = torch.randn(config.hidden_size, generator=generator)
    direction = (direction / direction.norm()).to(next(original.parameters()).device)
    return Stage(original, recipe, direction, layer)


def _draw_batches(encoded: Encoded, size: int, generator: torch.Generator, device: torch.device) -> Iterator[Batch]:
    rows: list[int] = []
    while True:
        while len(rows) < min(size, len(encoded.facts)):
            rows += torch.randperm(len(encoded.facts), generator=generator).tolist()
        taken, rows = rows[:size], rows[size:]
        yield take_batch(encoded, torch.tensor(taken), device)
