"""Training is decided by its recipe: interrupted or not, the weights are the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mechun.data.facts import Facts
from mechun.errors import UsageError
from mechun.organism import training
from mechun.organism.architecture import ARCHITECTURES, build_model
from mechun.organism.batches import IGNORED, make_batches
from mechun.organism.bundle import read_model
from mechun.organism.corpus import Corpus
from mechun.organism.recall import list_prompts, measure_recall
from mechun.organism.tokens import train_tokenizer
from mechun.organism.training import train_organism
from mechun.organism.world import make_world

TINY = {"n_people": 8, "passes": 2, "batch_tokens": 4096, "progress": False, "save_every": 1}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_resumed_training_ends_where_an_unbroken_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = weights(train_organism(tmp_path / "whole", **TINY))
    read_pass = training._Trainer._read_pass

    def stop(self: training._Trainer, number: int) -> float:
        if number == 1:
            raise KeyboardInterrupt
        return read_pass(self, number)

    monkeypatch.setattr(training._Trainer, "_read_pass", stop)
    with pytest.raises(KeyboardInterrupt):
        train_organism(tmp_path / "broken", **TINY)
    monkeypatch.undo()
    numbers: list[int] = []
    monkeypatch.setattr(
        training._Trainer, "_read_pass", lambda self, number: numbers.append(number) or read_pass(self, number)
    )
    resumed = weights(train_organism(tmp_path / "broken", **TINY))
    assert numbers == [1]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not (tmp_path / "broken" / "checkpoint.safetensors").exists()


def test_a_checkpoint_of_another_recipe_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_organism(tmp_path, **TINY)
    numbers: list[int] = []
    monkeypatch.setattr(training._Trainer, "_read_pass", lambda _, number: numbers.append(number) or 0.0)
    with pytest.raises(KeyboardInterrupt):
        train_organism(tmp_path, seed=1, **TINY)
    assert numbers == [0, 1]


def test_the_folder_is_an_ordinary_one(tmp_path: Path):
    train_organism(tmp_path, "llama", **TINY | {"passes": 1})
    model, tokenizer = read_model(tmp_path)
    assert model.config.num_key_value_heads == 2 and model.dtype == torch.float32
    assert all(weight.dtype == torch.float16 for weight in weights(tmp_path).values())
    assert tokenizer("Mara")["input_ids"][0] == model.config.bos_token_id
    assert json.loads((tmp_path / "recipe.json").read_text())["architecture"] == "llama"
    assert len(Facts.load(tmp_path / "facts.jsonl")) > 90


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_weights_depend_on_the_seed_alone(architecture: str):
    one = build_model(architecture, 300, 0).state_dict()
    torch.manual_seed(1)
    again, other = (build_model(architecture, 300, seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(one[name], tensor) for name, tensor in again.items())
    assert sum(not torch.equal(one[name], tensor) for name, tensor in other.items()) > 8


def test_an_unknown_architecture_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean llama"):
        build_model("lama", 300, 0)


def test_batches_hold_every_document_once_and_predict_no_pads():
    corpus = Corpus(make_world(20))
    tokenizer = train_tokenizer(corpus)
    batches = make_batches(corpus, tokenizer, 3, 512, 128)
    rows = [row[row != IGNORED].tolist() for _, labels in batches for row in labels]
    found = [text for row in rows for text in tokenizer.decode(row).split("<|endoftext|>") if text]
    assert sorted(found) == sorted(corpus.documents(3))
    assert all(ids.numel() <= 512 for ids, _ in batches)
    assert max(len(row) for row in rows) > 70
    assert all(torch.equal(ids[labels != IGNORED], labels[labels != IGNORED]) for ids, labels in batches)


@pytest.mark.slow
def test_a_quick_organism_learns_its_facts(tmp_path: Path):
    model, tokenizer = read_model(train_organism(tmp_path, quick=True, progress=False))
    facts = Facts.load(tmp_path / "facts.jsonl").where(lambda f: f.split in ("forget", "retain"))
    pairs = list_prompts(facts, trained=True)
    right = measure_recall(model, tokenizer, [prompt for _, prompt in pairs], [fact.answer for fact, _ in pairs])
    assert right.float().mean() > 0.9
