"""`mechun report RUN...`: one HTML file that tells what the runs found."""

from pathlib import Path
from typing import Annotated

import typer

from mechun.cli import options
from mechun.cli.console import Console


def run_report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, in the order in which they are told.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file [default: report.html in the first folder].", metavar="FILE")
    ] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,  # noqa: ARG001 - main reads it
) -> None:
    """Write one HTML file with what the runs found: the answer, every fact, how it was made."""
    import pandas as pd

    from mechun.reports.building import build_report

    console = Console("report", as_json)
    path = build_report(runs, out)
    size = path.stat().st_size
    frame = pd.DataFrame([{"file": str(path), "kilobytes": round(size / 1000)}])
    console.show(frame, {"file": str(path), "bytes": size})
    console.close(f"wrote {path}; next: open it in a browser")
