"""What a command says, and where: the result on stdout, everything else on stderr.

On stdout stands only the result: a table, or with `--json` one object `{"command", "summary", "rows"}`. Progress, notes
and warnings go to stderr. Colour and progress bars appear on a terminal only; `NO_COLOR` is honoured. Text that comes
from data is stripped of control characters, so that no fact can steer the reader's terminal.
"""

import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

PIPE_WIDTH = 200


@dataclass
class Console:
    """The mouth of one command.

    Attributes:
        command: Its name, as the JSON object gives it.
        as_json: Whether stdout carries an object instead of a table.
        silent: Whether to say nothing at all, as every process but the first does.
    """

    command: str
    as_json: bool = False
    silent: bool = False
    _said: set[str] = field(default_factory=set)

    def note(self, text: str) -> None:
        """One line on stderr."""
        if not self.silent:
            print(clean_text(text), file=sys.stderr, flush=True)  # noqa: T201 - this is the door to the screen

    def note_once(self, text: str) -> None:
        """One line on stderr, the first time only."""
        if text not in self._said:
            self._said.add(text)
            self.note(text)

    def show(
        self,
        frame: "pd.DataFrame",
        summary: Mapping[str, Any],
        *,
        columns: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        """The result: a table of some columns and rows, or the JSON object with all of them.

        Args:
            frame: The rows.
            summary: The headline figures, by name.
            columns: Columns of the table, in order; all of the frame's when empty.
            limit: Rows of the table at most; how many are left out is said on stderr.
        """
        if self.silent:
            return
        if self.as_json:
            self.write(write_json({"command": self.command, "summary": dict(summary), "rows": list_rows(frame)}))
            return
        chosen: Any = frame[list(columns)] if columns else frame
        self.write(draw_table(chosen, limit))
        hidden = len(frame) - len(frame.head(limit)) if limit is not None else 0
        if hidden:
            self.note(f"{hidden} more rows are not shown; --rows sets how many are")

    def close(self, text: str) -> None:
        """The last line: what was written, and the next command."""
        if self.as_json:
            self.note(text)
        elif not self.silent:
            self.write(clean_text(text))

    def progress(self, title: str, total: int | None = None) -> Any:
        """A progress bar on stderr; draws nothing when stderr is not a terminal."""
        from tqdm import tqdm

        return tqdm(
            total=total, desc=title, file=sys.stderr, disable=self.silent or not sys.stderr.isatty(), leave=False
        )

    def write(self, text: str) -> None:
        """Text on stdout as it is."""
        print(text, flush=True)  # noqa: T201 - this is the door to the screen


def draw_table(frame: "pd.DataFrame", limit: int | None = None) -> str:
    """The frame as a table: as wide as the terminal, or wide and colourless when stdout is no terminal."""
    import io

    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in frame.columns:
        number = frame[name].dtype.kind in "fiu"
        table.add_column(Text(str(name)), justify="right" if number else "left", no_wrap=number)
    for row in frame.head(limit).itertuples(index=False) if limit is not None else frame.itertuples(index=False):
        table.add_row(*(Text(format_value(value)) for value in row))
    terminal = sys.stdout.isatty()
    page = io.StringIO()
    width = None if terminal else PIPE_WIDTH
    RichConsole(file=page, width=width, force_terminal=terminal, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines() if line.strip())


def format_value(value: Any) -> str:
    """A cell: three decimals, a dash for what is missing, control characters stripped."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"
    return clean_text(str(value))


def clean_text(text: str) -> str:
    """The text on one line, without the control characters that a terminal would obey."""
    spaced = " ".join(text.split())
    return "".join(sign for sign in spaced if unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Co"))


def list_rows(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """The frame's rows as plain JSON values."""
    return [{str(name): plain_value(value) for name, value in row.items()} for row in frame.to_dict(orient="records")]


def plain_value(value: Any) -> Any:
    """The value as JSON can hold it: no NaN, no infinity, no foreign number types."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Iterable):
        return [plain_value(inner) for inner in value]
    return str(value)


def write_json(value: Any) -> str:
    """Strict JSON: NaN and infinities become null."""
    return json.dumps(plain_value(value), ensure_ascii=False, allow_nan=False)
