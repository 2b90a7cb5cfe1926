"""The answer: one row per fact, hardest first by rank, with everything the score was made from."""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mechun.data.encoding import Skipped
from mechun.data.facts import Facts
from mechun.difficulty.signals import SIGNALS, Reading
from mechun.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

BANDS = ("easy", "medium", "hard")
LEADING = ("id", "score", "rank", "band", "prompt", "answer", "subject", "relation", "entity")


@dataclass(frozen=True, eq=False)
class Difficulty:
    """Difficulty of facts, foretold.

    Attributes:
        frame: One row per scored fact in the order given: `id`, `score` (larger is harder), `rank` (1 is the hardest),
            `band` (easy, medium, hard: thirds by rank), the fact's own fields, and one column per signal with its raw
            value. `SIGNALS[key].sign` says which way a signal points.
        method: Key of the signal that the score is.
        meta: Settings, fingerprints and figures about the anchors, as plain JSON values.
        skipped: Facts that could not be scored, with the reason.
        notes: What a user should be told.
    """

    frame: "pd.DataFrame"
    method: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frame)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Difficulty)
            and (self.method, self.skipped, self.notes) == (other.method, other.skipped, other.notes)
            and dict(self.meta) == dict(other.meta)
            and self.frame.equals(other.frame)
        )

    def __hash__(self) -> int:
        return hash((self.method, tuple(self.frame["id"])))

    def __repr__(self) -> str:
        scores = self.frame["score"].dropna()
        spread = f"{scores.min():.3f} to {scores.max():.3f}" if len(scores) else "none known"
        left_out = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"Difficulty({len(self)} facts by {self.method}: {spread}{left_out})"

    @property
    def signals(self) -> tuple[str, ...]:
        """Keys of the signals in the frame."""
        return tuple(key for key in SIGNALS if key in self.frame.columns)

    def read(self, key: str) -> Reading:
        """A signal turned so that larger means harder, beside its raw value."""
        if key not in self.signals:
            raise UsageError(f"the table has no signal {key!r}", nearest(key, self.signals, "signals"))
        raw = torch.tensor(self.frame[key].to_numpy(dtype="float64", copy=True))
        return Reading(SIGNALS[key].sign * raw, raw)

    def hardest(self, n: int = 10) -> tuple[str, ...]:
        """Ids of the n facts that will resist most, the hardest first."""
        return tuple(self.frame.dropna(subset="score").nsmallest(n, "rank")["id"])

    def easiest(self, n: int = 10) -> tuple[str, ...]:
        """Ids of the n facts that will go first, the easiest first."""
        return tuple(self.frame.dropna(subset="score").nlargest(n, "rank")["id"])

    def to_frame(self) -> "pd.DataFrame":
        """A copy of the frame."""
        return self.frame.copy()

    def plot(self) -> "Figure":
        """How the scores are distributed."""
        from mechun.charts import plot_distribution

        return plot_distribution(self.frame, "score", title=self._title, unit="score (larger is harder)")

    def draw(self) -> str:
        """The same as static SVG."""
        from mechun.charts import draw_distribution

        return draw_distribution(self.frame, "score", title=self._title, unit="score (larger is harder)")

    def _repr_html_(self) -> str:
        shown = self.frame.sort_values("rank").head(10)[["rank", "score", "band", "prompt", "answer"]]
        return f"<p><code>{html.escape(repr(self))}</code></p>{self.draw()}{shown.to_html(index=False, escape=True)}"

    def save(self, path: str | Path) -> Path:
        """Write one parquet file; method, meta, skipped facts and notes travel in its schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rest: dict[str, Any] = {"method": self.method, "meta": dict(self.meta), "notes": self.notes}
        rest["skipped"] = [[skip.id, skip.reason] for skip in self.skipped]
        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), b"mechun": json.dumps(rest, sort_keys=True).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), str(path))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Difficulty":
        """Read what `save` wrote."""
        import pyarrow.parquet as pq

        table = pq.read_table(str(path))
        held = (table.schema.metadata or {}).get(b"mechun")
        if held is None:
            raise DataError(f"{path} holds no difficulty scores", "give the scores.parquet of a scoring run")
        rest = json.loads(held)
        skipped = tuple(Skipped(*skip) for skip in rest["skipped"])
        return cls(table.to_pandas(), rest["method"], rest["meta"], skipped, tuple(rest["notes"]))

    @property
    def _title(self) -> str:
        return (
            f"Difficulty of {len(self)} facts ({SIGNALS[self.method].title if self.method in SIGNALS else self.method})"
        )


def build_frame(facts: Facts, columns: Mapping[str, torch.Tensor], method: str) -> "pd.DataFrame":
    """Rows of the facts with score, rank and band made from one of the columns.

    Args:
        facts: The scored facts.
        columns: Raw value of each signal, row by row.
        method: The column that the score is; it is turned so that larger means harder.
    """
    import pandas as pd

    score = pd.Series((SIGNALS[method].sign * columns[method].double()).numpy(), dtype="float64")
    rank = score.rank(ascending=False, method="first").astype("Int64")
    known = max(int(score.notna().sum()), 1)
    third = [BANDS[2 - min((int(r) - 1) * 3 // known, 2)] if r is not pd.NA else "unknown" for r in rank]
    own = {name: [getattr(fact, name) for fact in facts] for name in LEADING[4:]}
    frame = pd.DataFrame({"id": list(facts.ids), "score": score, "rank": rank, "band": third, **own})
    signals = pd.DataFrame({key: columns[key].double().numpy() for key in SIGNALS if key in columns})
    return pd.concat([frame, signals], axis=1)
