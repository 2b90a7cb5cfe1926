"""`mechun organism`: the card, its verification, and a training that is stopped and continued."""

import json

import pytest

import mechun
from mechun.cli.app import main
from mechun.organism import card
from mechun.organism.bundle import WEIGHTS


def differ(ok: bool) -> list:
    return [card.Difference("gpt2", "gpt2/recall/forget", 0.99, 0.99 if ok else 0.5, 0.01, ok)] * 2


def test_verify_leaves_with_1_when_a_figure_is_off(monkeypatch, capsys):
    monkeypatch.setattr(card, "verify_bundle", lambda folder, progress: differ(True))
    assert main(["organism", "verify"]) == 0
    assert "every figure of the card holds" in capsys.readouterr().out
    monkeypatch.setattr(card, "verify_bundle", lambda folder, progress: differ(False))
    assert main(["organism", "verify", "--json"]) == 1
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["command"] == "organism verify" and answer["summary"] == {"figures": 2, "off": 2}
    assert answer["rows"][0]["measured"] == 0.5 and "2 figures are off" in err


@pytest.mark.skipif(not (WEIGHTS / "card.json").exists(), reason="the card is not written yet")
def test_card_prints_what_the_models_know(capsys):
    assert main(["organism", "card", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"name", "value", "tolerance", "n", "how"} <= set(answer["rows"][0])
    assert main(["organism", "card", "--rows", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3 + 1


def test_a_folder_without_card_is_refused(capsys, tmp_path):
    assert main(["organism", "card", "--folder", str(tmp_path)]) == 3
    assert "card.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_trained_by_the_command_is_scored_by_the_command(capsys, tmp_path):
    folder = tmp_path / "small"
    assert main(["organism", "train", "--quick", "--out", str(folder)]) == 0
    assert f"mechun score --model {folder}" in capsys.readouterr().out
    facts = mechun.load_facts(folder / "facts.jsonl")
    assert {"forget", "retain"} <= {fact.split for fact in facts}
    given = ["--forget", str(folder / "facts.jsonl"), "--limit", "48", "--set", "methods=npo", "--set", "draws=2"]
    assert main(["score", "--model", str(folder), *given, "--out", str(tmp_path / "run")]) in (0, 4)
    assert len(mechun.read(tmp_path / "run")) > 6
