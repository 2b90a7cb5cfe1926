"""The hooked view of a plain model, and the traps of making one (TransformerLens 3.9, measured).

Each trap is a test, here or beside: 1 view and model agree (test_checks); 2 layers add up (test_checks); 3 a typo in a
hook name raises (test_checks); 4 padding changes nothing (test_checks); 5 saved and loaded again, the same; 6 an
optimiser sees only the plain model's parameters; 7 the view follows an update; 8 the tokenizer survives the boot; 9 no
torch on `--help` (the shell's tests); 10 the sparsity of a dictionary after reload (the dictionaries' tests, with
`saes`); 11 the type is decided here (test_loading); 12 no neurons in a mixture of experts (test_checks).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mechun.models.checks import run_plain, run_view
from mechun.models.loading import load_model
from mechun.models.twin import share_twin
from mechun.models.view import LoadedModel
from tests.toys import FAMILIES, VOCAB, build_hf, make_tokenizer

Loaded = Callable[[str], LoadedModel]
Checkpoint = Callable[[str], Path]
FUSED = ("gpt2", "neox", "neox_sequential")


def draw_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))


def gap(model: LoadedModel) -> float:
    ids = draw_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    return (run_plain(model, ids, mask) - run_view(model.bridge, ids, mask)).abs().max().item()


def update_once(model: LoadedModel, rate: float = 0.05) -> None:
    optimizer = torch.optim.AdamW(model.hf.parameters(), lr=rate)
    ids = draw_ids()
    model.hf(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_view_follows_an_update(checkpoint: Checkpoint, family: str):
    """Trap 7: where query, key and value are fused, the view holds copies and has to be booted again."""
    model = load_model(checkpoint(family))
    before, logits = model.bridge, model.hf(draw_ids()).logits.detach()
    update_once(model)
    assert (model.hf(draw_ids()).logits - logits).abs().max() > 0.1
    assert gap(model) < 1e-4
    assert (model.bridge is not before) == (family in FUSED)
    assert model.bridge is model.bridge


def test_the_view_follows_a_replaced_parameter(checkpoint: Checkpoint):
    model = load_model(checkpoint("llama"))
    layer = model.hf.model.layers[0].mlp.down_proj
    before = model.bridge
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 3)
    assert model.bridge is not before
    assert gap(model) < 1e-4


@pytest.mark.parametrize("family", ("gpt2", "neox", "llama"))
def test_the_plain_model_stays_clean(checkpoint: Checkpoint, family: str):
    """Trap 6: what TransformerLens adds is frozen, and no parameter of the plain model is."""
    model = load_model(checkpoint(family), check=False)
    keys = list(model.hf.state_dict())
    bridge = model.bridge
    own = {id(p) for p in model.hf.parameters()}
    assert list(model.hf.state_dict()) == keys
    assert all(p.requires_grad for p in model.hf.parameters())
    assert {id(p) for p in bridge.parameters() if p.requires_grad} <= own
    assert not any(module.training for module in bridge.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same(checkpoint: Checkpoint, tmp_path: Path, family: str):
    """Trap 5: the keys of the file are those of the checkpoint, whatever was booted meanwhile."""
    model = load_model(checkpoint(family))
    update_once(model)
    again = load_model(model.save(tmp_path / "saved"), check=False)
    assert torch.equal(again.hf(draw_ids()).logits, model.hf(draw_ids()).logits)
    assert again.fingerprint == model.measure_fingerprint() != model.fingerprint
    first, second = (load_file(folder / "model.safetensors") for folder in (checkpoint(family), tmp_path / "saved"))
    assert set(first) == set(second)


def test_the_tokenizer_survives_the_boot():
    """Trap 8: the bridge would load another tokenizer, and put a BOS in front."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w7w8"])
    before = tokenizer("w5 w7w8 w6")["input_ids"]
    settings = (dict(tokenizer.init_kwargs), tokenizer.padding_side, len(tokenizer), dict(tokenizer.special_tokens_map))
    model = load_model(build_hf("gpt2", vocab_size=VOCAB + 1), tokenizer=tokenizer)
    assert before == [5, VOCAB, 6] == model.tokenizer("w5 w7w8 w6")["input_ids"]
    assert before == model.bridge.tokenizer("w5 w7w8 w6")["input_ids"]
    assert settings == (
        dict(tokenizer.init_kwargs),
        tokenizer.padding_side,
        len(tokenizer),
        dict(tokenizer.special_tokens_map),
    )


def test_a_tokenizer_without_pad_or_end_is_not_touched():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token = None
    model = load_model(build_hf("gpt2"), tokenizer=tokenizer)
    assert model.tokenizer.pad_token is None
    assert model.tokenizer.eos_token is None
    assert len(model.tokenizer) == VOCAB


def test_a_twin_shares_every_parameter():
    hf = build_hf("gpt2")
    twin = share_twin(hf)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in hf.parameters()]
    assert twin.transformer is not hf.transformer


def test_the_fingerprint_tells_models_apart(loaded: Loaded):
    prints = {loaded(family).fingerprint for family in FAMILIES}
    assert len(prints) == len(FAMILIES)
    tokenizer = make_tokenizer()
    one, same, other = (load_model(build_hf("gpt2", seed), tokenizer=tokenizer, check=False) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_the_fingerprint_follows_one_changed_number():
    model = load_model(build_hf("llama"), tokenizer=make_tokenizer(), check=False)
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert model.measure_fingerprint() != model.fingerprint
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight.copy_(build_hf("llama").model.layers[1].mlp.up_proj.weight)
    assert model.measure_fingerprint() == model.fingerprint


def test_it_tells_what_it_is(loaded: Loaded):
    model = loaded("gpt2")
    assert "gpt2" in repr(model)
    assert "float32 on cpu" in repr(model)
    assert model.context_length == 64
    assert not model.has_experts
