"""`mechun validate`: the table with its intervals, resumable, and told in a report."""

import mechun
from mechun.cli.app import main
from mechun.runs import Run
from tests.mechun.cli.small_runs import QUICK, call


def test_prints_signals_with_intervals_and_continues(capsys, monkeypatch, tmp_path):
    from mechun.difficulty import cells

    folder, real, made = tmp_path / "broken" / "run", cells.run_cell, []

    def stop_in_the_third(*given, **named):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(cells, "run_cell", stop_in_the_third)
    given = ["validate", *QUICK, "--seeds", "2", "--json"]
    assert call(capsys, folder, *given).code == 130
    done = call(capsys, folder, *given)
    assert done.code == 0, done.err
    assert len(made) == 5  # two seeds by two halves, and the one that was stopped
    answer = done.answer
    assert answer["command"] == "validate" and answer["summary"]["trials"] == 4
    by_signal = {row["signal"]: row for row in answer["rows"] if row["target"] == "pooled"}
    assert {"cud", "cud_paper", "cud_shuffled", "calibrated", "loss", "mrd"} <= set(by_signal)
    assert by_signal["loss"]["low"] <= by_signal["loss"]["rho"] <= by_signal["loss"]["high"]
    assert by_signal["loss"]["seconds_per_fact"] > 0
    assert "label repeats itself" in done.err and "next: mechun report" in done.err.splitlines()[-1]
    assert mechun.read(folder).pick("pooled")["rho"].dropna().is_monotonic_decreasing
    assert Run.load(folder).manifest["summary"]["trials"] == 4

    again = call(capsys, folder, "validate", *QUICK, "--seeds", "2", "--target", "npo", "--rows", "3")
    assert again.code == 0 and "complete already" in again.err and len(again.out.splitlines()) == 2 + 3 + 1
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Which signals foretell it" in page and "held-out Spearman" in page
    assert len(mechun.read(folder / "report.html")["run/labels"]) == 2
    assert main(["validate", *QUICK, "--target", "nop"]) == 2
    assert "did you mean npo" in capsys.readouterr().err
