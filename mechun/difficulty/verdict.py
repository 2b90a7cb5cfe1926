"""The answer of a validation: one row per signal and target, with what is needed to read it."""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechun.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class Validation:
    """How well signals foretold difficulty.

    Attributes:
        frame: One row per signal and target (a method, or "pooled"): `rho` with its bounds at 95%, `partial` (given
            initial loss and answer length), `gap` to `calibrated` with its interval, `trials`, `facts`,
            `seconds_per_fact`.
        meta: `reliability` of each label, `agreement` between methods, retained accuracy after unlearning, settings and
            fingerprints, as plain JSON values.
    """

    frame: "pd.DataFrame"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Validation) and dict(self.meta) == dict(other.meta) and self.frame.equals(other.frame)

    def __hash__(self) -> int:
        return hash(tuple(self.frame["signal"]))

    def __repr__(self) -> str:
        pooled = self.pick("pooled").set_index("signal")
        figures = [
            f"{key} {pooled.loc[key, 'rho']:+.2f} [{pooled.loc[key, 'low']:+.2f}, {pooled.loc[key, 'high']:+.2f}]"
            for key in ("cud", "calibrated")
            if key in pooled.index
        ]
        return f"Validation({', '.join(figures)}; best single signal {self._name_best()})"

    def pick(self, target: str = "pooled") -> "pd.DataFrame":
        """The rows of one target, the best first."""
        return self.frame.loc[self.frame["target"] == target].sort_values(by="rho", ascending=False, ignore_index=True)

    def to_frame(self) -> "pd.DataFrame":
        """A copy of the frame."""
        return self.frame.copy()

    def plot(self) -> "Figure":
        """Every signal's correlation with its interval."""
        from mechun.charts import plot_intervals

        return plot_intervals(self.pick(), label="title", value="rho", low="low", high="high", **self._words())

    def draw(self) -> str:
        """The same as static SVG."""
        from mechun.charts import draw_intervals

        return draw_intervals(self.pick(), label="title", value="rho", low="low", high="high", **self._words())

    def _repr_html_(self) -> str:
        return f"<p><code>{html.escape(repr(self))}</code></p>{self.draw()}"

    def save(self, path: str | Path) -> Path:
        """Write one parquet file; meta travels in its schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        held = json.dumps(dict(self.meta), sort_keys=True).encode()
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), b"mechun": held}), str(path))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Validation":
        """Read what `save` wrote."""
        import pyarrow.parquet as pq

        table = pq.read_table(str(path))
        held = (table.schema.metadata or {}).get(b"mechun")
        if held is None:
            raise DataError(f"{path} holds no validation", "give the validation.parquet of a validation run")
        return cls(table.to_pandas(), json.loads(held))

    def _name_best(self) -> str:
        pooled = self.pick("pooled")
        single = pooled.loc[~pooled["signal"].isin(("calibrated", "cud_shuffled", "entity_rank"))]
        if not len(single):
            return "none"
        best = single.to_dict("records")[0]
        return f"{best['signal']} {best['rho']:+.2f}"

    def _words(self) -> dict[str, str]:
        return {"title": "Signals against realised difficulty", "unit": "Spearman, held out"}
