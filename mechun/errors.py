"""The faults a user can mend: each says what was wrong, and what to do next.

Every fault that is not a bug of the project is raised as a `MechunError`. The shell prints it as one line, without a
traceback, and leaves with its exit code; in a notebook it reads as an ordinary exception.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class MechunError(Exception):
    """A fault with a remedy.

    Attributes:
        message: What was wrong, naming the value.
        hint: The nearest valid values or the next step; empty when there is none.
        exit_code: What the shell leaves with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(MechunError):
    """The request itself cannot be carried out: an unknown name, or options that exclude each other."""

    exit_code = 2


class RunError(UsageError):
    """The run folder holds something else than what was asked for."""


class ModelError(MechunError):
    """The model cannot be used; the message says why."""

    exit_code = 3


class DataError(MechunError):
    """The data cannot be used; the message names the place."""

    exit_code = 3


def nearest(value: str, valid: Iterable[str], label: str = "valid") -> str:
    """Hint that names the valid values closest to a mistyped one, or the first few when none is close.

    Example:
        >>> nearest("scor", ["score", "show"])
        'did you mean score or show?'
    """
    names = sorted(valid)
    close = get_close_matches(value, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{label}: {shown}" if names else ""
