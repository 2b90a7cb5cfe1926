"""The table of attribution methods, and running one of them over many examples.

`discover` sorts the examples by how much of clean and corrupt is common, so that batches share long prefixes, runs
batch by batch, and puts the rows back into the order of the pairs. A batch that does not fit into memory is halved.
"""

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from circuits.averages import measure_means
from circuits.graph import Graph
from circuits.methods.chance import RANDOM
from circuits.methods.eap import EAP
from circuits.methods.eap_ig import EAP_IG_ACTIVATIONS, EAP_IG_INPUTS
from circuits.methods.exact import EXACT
from circuits.methods.record import Method
from circuits.passes import find_first_difference
from circuits.scores import EdgeScores
from circuits.types import ContrastPairs, HookedModel

METHODS: Mapping[str, Method] = MappingProxyType(
    {method.key: method for method in (EAP_IG_INPUTS, EAP, EAP_IG_ACTIVATIONS, EXACT, RANDOM)}
)
Progress = Callable[[int, int], None]

BATCH_NUMBERS = 1_250_000  # points x rows x positions x d_model: about what keeps a CPU's caches and cores busy

log = logging.getLogger(__name__)


def discover(
    model: HookedModel,
    pairs: ContrastPairs,
    method: str | Callable[..., EdgeScores] = "eap_ig_inputs",
    *,
    batch_size: int | Literal["auto"] = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> EdgeScores:
    """Scores of every edge for every example.

    Args:
        model: The model, in eval mode; left as it was found.
        pairs: The contrasts, any number of them.
        method: A key of `METHODS`, or a function of the same signature.
        batch_size: Examples per batch; "auto" takes more of them the smaller the model and the shorter the inputs.
        progress: Called with the number of examples done and their total after each batch.
        **options: Passed to the method: `metric`, `baseline`, `points`, ...; a mean is measured over all pairs.

    Returns:
        Scores in the order of the pairs, on the CPU; what was worth knowing is in `meta["notes"]`.

    Raises:
        KeyError: No method has that key.

    Example:
        scores = discover(model, pairs, "eap", metric="logit_difference")
        circuit = select_edges(scores.mean().values, scores.graph, n=75)
    """
    if not callable(method) and method not in METHODS:
        raise KeyError(f"no method {method!r}: {', '.join(METHODS)}")
    if not len(pairs):
        raise ValueError("there are no contrasts to attribute")
    function = method if callable(method) else METHODS[method].function
    graph, notes = options.pop("graph", None) or Graph.from_cfg(model.cfg), options.pop("notes", list[str]())
    size = guess_batch_size(model, pairs) if batch_size == "auto" else batch_size
    if options.get("baseline") == "mean":
        options["baseline"] = measure_means(model, pairs, graph, size)
    order, parts, rows = _sort_rows(pairs), list[EdgeScores](), list[int]()
    while len(rows) < len(order):
        taken = order[len(rows) : len(rows) + size]
        try:
            part = function(model, pairs.select(taken), graph=graph, notes=notes, **options)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            size = _halve(len(taken), error, notes)
            continue
        parts.append(part)
        rows += taken
        if progress is not None:
            progress(len(rows), len(order))
    return _join(parts, rows, pairs, graph, notes)


def guess_batch_size(model: HookedModel, pairs: ContrastPairs) -> int:
    """Examples per batch such that a pass over five points stays in a size where stacking pays; 8 to 64."""
    numbers = 5 * pairs.clean.shape[1] * int(model.cfg.d_model)
    return max(8, min(64, BATCH_NUMBERS // numbers))


def _sort_rows(pairs: ContrastPairs) -> list[int]:
    first = find_first_difference(pairs).tolist()
    last = pairs.answer_positions.where(pairs.answer_mask, 0).amax(1).tolist()
    return sorted(range(len(pairs)), key=lambda row: (first[row], last[row]))


def _halve(size: int, error: Exception, notes: list[str]) -> int:
    """Half the batch size after running out of memory; any other fault, or a batch of one, is passed on."""
    if size == 1 or not (isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()):
        raise error
    line = f"a batch of {size} does not fit into memory: going on with {size // 2}"
    log.warning(line)
    notes.append(line)
    return size // 2


def _join(parts: list[EdgeScores], rows: list[int], pairs: ContrastPairs, graph: Graph, notes: list[str]) -> EdgeScores:
    values: Tensor = torch.cat([part.values.cpu() for part in parts])
    back = torch.tensor(rows).argsort()
    meta = {**parts[0].meta, "notes": list(dict.fromkeys(notes))}
    return EdgeScores(values[back], graph, parts[0].method, pairs.ids, meta)
