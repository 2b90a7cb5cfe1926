"""The record that every method leaves in the table of methods."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One attribution method.

    Attributes:
        key: What it is asked for by.
        function: `function(model, pairs, *, graph, metric, notes, ...) -> EdgeScores`.
        title: What it is called in print.
        paper: Where it comes from.
        cost: Passes per batch, in words.
        line: What it does, in one line.
    """

    key: str
    function: Callable[..., Any]
    title: str
    paper: str
    cost: str
    line: str
