"""`mechun organism train | verify | card`: the bundled model, how it was made, and whether it still is what it says."""

from pathlib import Path
from typing import Annotated

import typer

from mechun.cli import options
from mechun.cli.console import Console

organism = typer.Typer(
    no_args_is_help=True,
    suggest_commands=False,
    rich_markup_mode=None,
    help="The bundled organism: train it again, measure its card again, read the card.",
)

Folder = Annotated[Path | None, typer.Option("--folder", help="A bundle other than the shipped one.", metavar="FOLDER")]
ARCHITECTURES = ("gpt2", "llama")


@organism.command()
def train(
    architecture: Annotated[str, typer.Option("--architecture", help="gpt2 or llama.")] = "gpt2",
    gold: Annotated[bool, typer.Option("--gold", help="Leave the forgotten people out of the corpus.")] = False,
    reinit: Annotated[bool, typer.Option("--reinit", help="Start from other weights under the same seed.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A world of 20 people, in under a minute.")] = False,
    seed: options.Seed = 0,
    out: options.Out = None,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,  # noqa: ARG001 - main reads it
) -> None:
    """Train a model of the organism's world from scratch; the same command continues an interrupted training."""
    import sys

    import pandas as pd

    from mechun.organism.training import train_organism

    options.choose("--architecture", architecture, ARCHITECTURES)
    kind = f"{architecture}{'-gold' if gold else ''}{'-reinit' if reinit else ''}{'-quick' if quick else ''}"
    folder = out or Path("runs") / f"organism-{kind}-{seed}"
    console = Console("organism train", as_json)
    train_organism(
        folder, architecture, gold, reinit, seed=seed, quick=quick, resume=not fresh, progress=sys.stderr.isatty()
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    frame = pd.DataFrame([{"model": kind, "seed": seed, "folder": str(folder), "megabytes": round(size / 1e6, 2)}])
    console.show(frame, {"folder": str(folder)})
    console.close(f"wrote {folder}; next: mechun score --model {folder} --forget {folder / 'facts.jsonl'}")


@organism.command()
def verify(
    folder: Folder = None,
    rows: options.Rows = 40,
    as_json: options.AsJson = False,
    debug: options.Debug = False,  # noqa: ARG001 - main reads it
) -> int:
    """Measure every figure of the card again; leaves with 1 when one is off."""
    import sys
    from dataclasses import asdict

    import pandas as pd

    from mechun.organism.card import verify_bundle

    console = Console("organism verify", as_json)
    differences = verify_bundle(folder, progress=sys.stderr.isatty())
    frame = pd.DataFrame([asdict(difference) for difference in differences])
    off = sum(not difference.ok for difference in differences)
    shown = ("figure", "stated", "measured", "tolerance", "ok")
    console.show(frame.sort_values("ok", kind="stable"), {"figures": len(frame), "off": off}, columns=shown, limit=rows)
    console.close("every figure of the card holds; next: mechun score" if not off else f"{off} figures are off")
    return 1 if off else 0


@organism.command()
def card(
    folder: Folder = None,
    write: Annotated[bool, typer.Option("--write", help="Measure everything first and write it; minutes.")] = False,
    rows: options.Rows = 40,
    as_json: options.AsJson = False,
    debug: options.Debug = False,  # noqa: ARG001 - main reads it
) -> None:
    """Print the card: what the bundled models know, as measured."""
    import pandas as pd

    from mechun.organism.bundle import read_card
    from mechun.organism.card import write_card

    console = Console("organism card", as_json)
    held = write_card(folder) if write else read_card(folder)
    frame = pd.DataFrame(held["figures"])
    summary = {name: value for name, value in held.items() if name != "figures"}
    console.show(frame, summary, columns=("name", "value", "n", "how"), limit=rows)
    console.close("next: mechun organism verify measures it again")
