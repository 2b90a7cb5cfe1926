"""One real scoring run on the bundled organism, made once."""

import contextlib
import io

import pytest

from mechun.cli.app import main
from tests.mechun.cli.small_runs import QUICK, Finished


@pytest.fixture(scope="session")
def scored(tmp_path_factory) -> Finished:
    """`mechun score --json` on forty facts of the organism."""
    folder = tmp_path_factory.mktemp("runs") / "score"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["score", "--json", *QUICK, "--out", str(folder)])
    return Finished(folder, code, out.getvalue(), err.getvalue())
