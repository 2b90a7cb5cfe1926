"""Every signal of difficulty that needs no unlearning run, as one table.

A signal's function reads a raw number per fact off a `Material`; `Signal.read` turns it so that *larger means harder*
and keeps the raw value beside it. Directions are those of the papers, not fitted to anything; a signal that points the
wrong way on some model must show up as a negative correlation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from mechun.difficulty.material import Material
from mechun.errors import UsageError, nearest

Values = Float[Tensor, " fact"]


@dataclass(frozen=True)
class Reading:
    """A signal on some facts.

    Attributes:
        values: Larger means harder.
        raw: The measured quantity itself.
    """

    values: Values
    raw: Values


@dataclass(frozen=True)
class Signal:
    """One way to guess difficulty.

    Attributes:
        key: Column name and name on the command line.
        function: Raw value of each fact of a chunk; None for what is made later from unlearning runs.
        sign: 1 where a large raw value means hard, -1 where it means easy.
        title: Full name.
        paper: Where it comes from.
        cost: Passes per fact.
        needs_retain: Whether it is NaN without retained facts.
        needs_runs: Whether it needs unlearning runs on other facts.
        ingredient: Whether it describes the circuit rather than guesses difficulty by itself.
    """

    key: str
    function: Callable[[Material], Values] | None
    sign: int
    title: str
    paper: str
    cost: str
    needs_retain: bool = False
    needs_runs: bool = False
    ingredient: bool = False

    @property
    def anchor_free(self) -> bool:
        """Whether it can be had without any unlearning run."""
        return not self.needs_runs

    def read(self, material: Material) -> Reading:
        """The signal on a chunk; facts on which it is unknown are NaN."""
        if self.function is None:
            raise UsageError(f"{self.key} is made from unlearning runs, not read from a model")
        raw = self.function(material).to(torch.float64)
        return Reading(self.sign * raw, raw)


def _product(name: str, *, cosine: bool) -> Callable[[Material], Values]:
    def read(material: Material) -> Values:
        found = material.gradients.cosines if cosine else material.gradients.products
        return found.get(name, torch.full_like(material.gradients.norm, float("nan")))

    return read


def _measure_length(material: Material) -> Values:
    return material.encoded.answer_mask.sum(1).double()


_CUD, _RUM, _GUARD, _TOFU = "arXiv 2601.09624", "arXiv 2406.01257", "arXiv 2506.10946", "arXiv 2401.06121"
_MEASURED: tuple[Signal, ...] = (
    Signal("loss", lambda m: m.recall.loss, -1, "Initial loss", "", "1 forward"),
    Signal("probability", lambda m: (-m.recall.loss).exp(), 1, "Mean answer probability", _TOFU, "1 forward"),
    Signal("memorisation", lambda m: m.recall.hits, 1, "Exact memorisation", "arXiv 2210.01504", "1 forward"),
    Signal("extraction", lambda m: m.recall.tail, 1, "Extraction strength", "arXiv 2407.10058", "1 forward"),
    Signal("grad_norm", lambda m: m.gradients.norm, -1, "Gradient norm", "arXiv 2107.07075", "1 forward and backward"),
    Signal("retain_alignment", _product("retain", cosine=True), 1, "Forget-retain alignment (cosine)", _GUARD,
           "1 forward and backward", needs_retain=True),
    Signal("retain_conflict", _product("retain", cosine=False), 1, "Forget-retain inner product", _GUARD,
           "1 forward and backward", needs_retain=True),
    Signal("forget_alignment", _product("forget", cosine=False), -1, "First-order rise by ascent on the set", "",
           "2 forward and backward"),
    Signal("mrd", lambda m: m.mrd, -1, "Memory removal difficulty", "arXiv 2504.06658", "33 forward"),
    Signal("entanglement", lambda m: m.distance, -1, "Distance to retained facts", _RUM, "1 forward",
           needs_retain=True),
    Signal("memorisation_gap", lambda m: m.base_loss - m.recall.loss, 1, "Loss before learning minus loss", _RUM,
           "2 forward"),
    Signal("exposure", lambda m: m.read_meta("exposure"), 1, "Times seen in training, where known", "", "none"),
    Signal("answer_length", _measure_length, 1, "Answer tokens", "", "none"),
    Signal("circuit_strength", lambda m: m.wiring.strength, 1, "Sum of |edge score|", _CUD, "attribution",
           ingredient=True),
    Signal("circuit_spread", lambda m: m.wiring.spread, 1, "Effective number of edges", _CUD, "attribution",
           ingredient=True),
    Signal("circuit_depth", lambda m: m.wiring.depth, 1, "Mean reading layer", _CUD, "attribution", ingredient=True),
    Signal("circuit_reach", lambda m: m.wiring.reach, -1, "Mean layers spanned by an edge", _CUD, "attribution",
           ingredient=True),
    Signal("circuit_late", lambda m: m.wiring.late, 1, "Share into the last third", _CUD, "attribution",
           ingredient=True),
    Signal("circuit_balance", lambda m: m.wiring.balance, 1, "Net over absolute support", _CUD, "attribution",
           ingredient=True),
    Signal("circuit_path", lambda m: m.paths["mean_path"], 1, "Mean path length", _CUD, "attribution",
           ingredient=True),
    Signal("circuit_longest", lambda m: m.paths["longest_path"], 1, "Longest path", _CUD, "attribution",
           ingredient=True),
    Signal("circuit_edges", lambda m: m.paths["n_edges"], 1, "Edges left after pruning", _CUD, "attribution",
           ingredient=True),
)  # fmt: skip
_DERIVED: tuple[Signal, ...] = (
    Signal("cud", None, 1, "Circuit-guided difficulty", _CUD, "attribution + anchors", needs_runs=True),
    Signal("circuit_fit", None, 1, "Ridge regression on edge scores", "", "attribution + anchors",
           needs_runs=True),
    Signal("relation_rank", None, 1, "Labels of facts of the same relation", "", "anchors", needs_runs=True),
    Signal("entity_rank", None, 1, "Labels of other facts of the same entity", "", "a run on the facts themselves",
           needs_runs=True),
    Signal("calibrated", None, 1, "Rank regression on all of these", "", "attribution + anchors", needs_runs=True),
)  # fmt: skip

SIGNALS: Mapping[str, Signal] = MappingProxyType({signal.key: signal for signal in (*_MEASURED, *_DERIVED)})
MEASURED: tuple[str, ...] = tuple(signal.key for signal in _MEASURED)
DERIVED: tuple[str, ...] = tuple(signal.key for signal in _DERIVED)


def choose_signals(keys: Sequence[str] | None = None) -> tuple[Signal, ...]:
    """The signals of these names in the table's order; None for all that can be measured without runs."""
    for key in keys or ():
        if key not in SIGNALS:
            raise UsageError(f"no signal is called {key!r}", nearest(key, SIGNALS, "signals"))
    wanted = MEASURED if keys is None else [key for key in MEASURED if key in keys]
    return tuple(SIGNALS[key] for key in wanted)
