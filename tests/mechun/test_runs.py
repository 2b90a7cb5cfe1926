"""The run folder: what it remembers, what it refuses, and that stopping it loses nothing."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from mechun.errors import RunError
from mechun.runs import Run, Workers, compare_specs, find_version, find_workers, hash_spec, run_chunks

SPEC = {"command": "demo", "seed": 0, "options": {"n": 3, "signals": ("a", "b")}}


def fill(run: Run, stop_at: int | None = None) -> list[int]:
    """Five chunks of one row each; stops like Ctrl-C before the given one."""
    done = []

    def work(position: int, path: Path) -> None:
        if position == stop_at:
            raise KeyboardInterrupt
        done.append(position)
        pd.DataFrame({"value": [position * 1.5]}).to_parquet(path, index=False)

    run_chunks(run, [f"chunks/{n}.parquet" for n in range(5)], work)
    parts = [run.load_frame(f"chunks/{n}.parquet") for n in range(5)]
    run.save_frame("all.parquet", pd.concat(parts, ignore_index=True))
    return done


def test_interrupted_and_continued_equals_unbroken(tmp_path):
    with Run.open(tmp_path / "whole", SPEC) as whole:
        assert fill(whole) == [0, 1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt), Run.open(tmp_path / "broken", SPEC) as broken:
        fill(broken, stop_at=3)
    assert Run.load(broken.folder).status == "interrupted"
    assert not (broken.folder / "all.parquet").exists()
    with Run.open(tmp_path / "broken", SPEC) as again:
        assert fill(again) == [3, 4]
    assert again.status == "done"
    assert (again.folder / "all.parquet").read_bytes() == (whole.folder / "all.parquet").read_bytes()


def test_a_failed_run_says_why_and_continues(tmp_path):
    with pytest.raises(ValueError, match="broken"), Run.open(tmp_path, SPEC):
        raise ValueError("broken")
    held = Run.load(tmp_path)
    assert held.status == "failed" and held.manifest["fault"] == "ValueError: broken"
    with Run.open(tmp_path, SPEC):
        pass
    assert Run.load(tmp_path).status == "done" and Run.load(tmp_path).manifest["fault"] is None


def test_half_written_files_never_appear(tmp_path):
    with Run.open(tmp_path, SPEC) as run:
        with pytest.raises(OSError, match="disk"), run.writing("x.json") as path:
            path.write_text("{")
            raise OSError("disk full")
        assert not run.has("x.json")
        assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_another_spec_is_refused_with_the_difference(tmp_path):
    Run.open(tmp_path, SPEC)
    other = {**SPEC, "seed": 1, "options": {"n": 3, "signals": ["a"]}}
    with pytest.raises(RunError) as fault:
        Run.open(tmp_path, other)
    assert "seed is 0 there and 1 here" in str(fault.value)
    assert "options.signals is ['a', 'b'] there and ['a'] here" in str(fault.value)
    assert "options.n" not in str(fault.value)
    assert "--fresh" in str(fault.value) and fault.value.exit_code == 2
    assert Run.load(tmp_path).spec["seed"] == 0


def test_fresh_drops_the_run_and_nothing_else(tmp_path):
    with Run.open(tmp_path, SPEC) as run:
        fill(run)
    (tmp_path / "mine.txt").write_text("keep")
    with Run.open(tmp_path, {**SPEC, "seed": 1}, fresh=True) as run:
        assert not run.has("all.parquet") and not run.has("chunks/0.parquet")
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert Run.load(tmp_path).spec["seed"] == 1


def test_fresh_never_deletes_outside_the_folder(tmp_path):
    (tmp_path / "precious").write_text("keep")
    run = Run.open(tmp_path / "run", SPEC)
    run.record(files=["../precious"])
    Run.open(tmp_path / "run", SPEC, fresh=True)
    assert (tmp_path / "precious").exists()


def test_folders_that_are_not_runs_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        Run.open(tmp_path / "file", SPEC)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for fresh in (False, True):
        with pytest.raises(RunError, match="holds files, but no run"):
            Run.open(tmp_path / "other", SPEC, fresh=fresh)
    with pytest.raises(RunError, match="no run folder"):
        Run.load(tmp_path / "nowhere")
    with pytest.raises(RunError, match="not a run folder"):
        Run.load(tmp_path / "other")
    (tmp_path / "other" / "run.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        Run.load(tmp_path / "other")


def test_a_finished_run_keeps_its_time(tmp_path):
    with Run.open(tmp_path, SPEC):
        pass
    Run.load(tmp_path).record(finished="then")
    with Run.open(tmp_path, SPEC) as run:
        assert run.status == "done"
    assert Run.load(tmp_path).manifest["finished"] == "then"


def test_the_manifest_says_how_it_was_made(tmp_path):
    with Run.open(tmp_path, SPEC, details={"command": "mechun demo"}) as run:
        pass
    held = json.loads((run.folder / "run.json").read_text())
    assert held["hash"] == hash_spec(SPEC) and held["command"] == "mechun demo"
    assert {"mechun", "torch"} <= set(held["versions"]) and held["python"] and held["started"] <= held["finished"]


def test_identity_ignores_the_order_of_keys():
    assert hash_spec({"a": 1, "b": 2}) == hash_spec({"b": 2, "a": 1}) != hash_spec({"a": 2, "b": 1})
    assert compare_specs({"a": (1, 2)}, {"a": [1, 2]}) == {}
    assert compare_specs({"a": 1}, {"b": {"c": 1}}) == {"a": (1, None), "b.c": (None, 1)}


def test_each_process_fills_its_own_chunks(tmp_path):
    first, second = Workers(0, 2), Workers(1, 2)
    names = [f"labels/{n}.json" for n in range(5)]

    def write(_: int, path: Path) -> None:
        path.write_text("1")

    class Apart(Workers):
        def wait(self):
            pass

    run = Run.open(tmp_path, SPEC)
    run_chunks(Run(run.folder, run.manifest, Apart(1, 2)), names, write)
    assert [run.has(n) for n in names] == [False, True, False, True, False]
    run_chunks(Run(run.folder, run.manifest, Apart(0, 2)), names, write)
    assert all(run.has(n) for n in names)
    assert first.first and not second.first


def test_one_process_needs_no_accelerate(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_workers() == Workers(0, 1)
    assert find_version("no-such-distribution") is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_folder_that_cannot_be_made(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot be made"):
        Run.open(tmp_path / "x", SPEC)
