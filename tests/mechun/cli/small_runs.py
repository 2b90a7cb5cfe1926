"""Runs on the bundled organism that are small enough for every test run."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mechun.cli.app import main

N_FACTS = 40
QUICK = (
    "--limit",
    str(N_FACTS),
    "--set",
    "methods=npo",
    "--set",
    "steps=3",
    "--set",
    "draws=2",
    "--set",
    "retain_sample=16",
)
"""What makes a run on the organism quick: few facts, one short unlearning run per fold, few noisy models. More
facts than one chunk holds, so that several processes have something to share."""


@dataclass(frozen=True)
class Finished:
    """A command that ran: its folder, its exit code and what it said."""

    folder: Path
    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict:
        """The JSON object on stdout."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def call(capsys, folder: Path, *given: str) -> Finished:
    """Run a command in this process."""
    code = main([*given, "--out", str(folder)])
    return Finished(folder, code, *capsys.readouterr())
