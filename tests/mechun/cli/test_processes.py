"""Two processes on the CPU give what one gives; only the first of them speaks."""

import json
import os
import socket
import subprocess
import sys

import pandas as pd

import mechun
from mechun.runs import Run
from tests.mechun.cli.small_runs import QUICK

LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_give_the_result_of_one(scored, tmp_path):
    """`--multi_gpu` is accelerate's name for "several processes on this machine"; without a GPU they speak gloo."""
    folder = tmp_path / "apart" / "run"
    command = [sys.executable, *LAUNCH, "--num_processes", "2", "--main_process_port", str(free_port()), "-m", "mechun"]
    given = ["score", "--json", *QUICK, "--device", "cpu", "--out", str(folder)]
    done = subprocess.run(
        [*command, *given], capture_output=True, text=True, timeout=540, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout)["rows"]) == len(scored.answer["rows"])
    assert done.stderr.count(f"wrote {folder}") == 1
    both, one = mechun.read(folder), mechun.read(scored.folder)
    pd.testing.assert_frame_equal(both.frame, one.frame, rtol=1e-3, atol=1e-5)
    assert {**Run.load(folder).spec} == {**Run.load(scored.folder).spec}
    assert Run.load(folder).manifest["processes"] == 2 and not (folder / "chunks").exists()
    assert {path.name for path in (folder / "labels").iterdir()} == {
        p.name for p in (scored.folder / "labels").iterdir()
    }
