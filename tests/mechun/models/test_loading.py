"""From a source to a checked model: devices and types, tokenizers, and folders that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechun.errors import ModelError, UsageError
from mechun.models.loading import load_model
from tests.toys import VOCAB, build_hf, make_tokenizer

Checkpoint = Callable[[str], Path]


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A GPT-2 folder that may be changed."""
    return Path(shutil.copytree(checkpoint("gpt2"), tmp_path / "gpt2"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(source: Path | str, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_16_bits_are_widened_on_the_cpu_unless_asked_for(checkpoint: Checkpoint, tmp_path: Path):
    """Trap 11: the type is decided here, not by a default of the bridge."""
    build_hf("llama").bfloat16().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    wide = load_model(tmp_path, device="cpu")
    assert wide.dtype == torch.float32 == wide.bridge.cfg.dtype
    for dtype in ("bfloat16", torch.bfloat16):
        narrow = load_model(tmp_path, device="cpu", dtype=dtype)
        assert narrow.dtype == torch.bfloat16
        assert narrow.bridge.cfg.dtype == torch.bfloat16
        assert {p.dtype for p in narrow.bridge.parameters()} == {torch.bfloat16}
    assert load_model(tmp_path, dtype="float64", device="cpu").dtype == torch.float64


def test_a_module_in_memory_is_used_as_it_is():
    hf, tokenizer = build_hf("gpt2"), make_tokenizer()
    model = load_model(hf.train(), tokenizer=tokenizer)
    assert model.hf is hf
    assert model.tokenizer is tokenizer
    assert not hf.training
    assert model.name == "GPT2LMHeadModel"


def test_a_module_without_tokenizer_is_refused():
    assert "pass tokenizer=" in refusal(build_hf("gpt2"))


def test_a_tokenizer_may_come_from_another_folder(checkpoint: Checkpoint, folder: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "holds no tokenizer" in refusal(folder)
    model = load_model(folder, tokenizer=checkpoint("gpt2"), check=False)
    assert model.tokenizer("w5 w6")["input_ids"] == [5, 6]


def test_a_module_finds_the_tokenizer_of_its_folder(checkpoint: Checkpoint):
    model = load_model(checkpoint("gpt2"), check=False)
    again = load_model(model.hf, check=False)
    assert again.tokenizer("w5 w6")["input_ids"] == [5, 6]
    with pytest.raises(ModelError, match="no tokenizer folder ./nowhere/x"):
        load_model(model.hf, tokenizer="./nowhere/x")


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Checkpoint):
    message = refusal(checkpoint("gpt2"), tokenizer=make_tokenizer(VOCAB + 1))
    assert f"knows {VOCAB + 1} tokens, the model only {VOCAB}" in message


def test_a_padding_token_without_a_weight_is_accepted(checkpoint: Checkpoint):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert load_model(checkpoint("gpt2"), tokenizer=tokenizer, check=False).tokenizer.pad_token_id == VOCAB


def test_missing_weights_are_refused_not_invented(folder: Path):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(folder)
    assert "missing_keys" in message
    assert "mlp.c_fc.weight" in message


def test_weights_of_another_shape_are_refused(folder: Path):
    change_config(folder, n_positions=32)
    assert "do not fit" in refusal(folder) or "cannot be loaded" in refusal(folder)


def test_weights_that_are_not_finite_are_refused(folder: Path):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "logits that are not finite" in refusal(folder, check=False)


def test_code_of_a_checkpoint_is_never_run(folder: Path):
    (folder / "modeling_own.py").write_text("raise SystemExit('the code of a checkpoint ran')")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    assert "code of its own, which is never run" in refusal(folder)


def test_broken_files_are_named(folder: Path):
    (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    assert f"{folder} cannot be loaded" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert f"{folder} cannot be loaded" in refusal(folder)


def test_quantised_weights_are_refused(folder: Path):
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "is quantised" in refusal(folder)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "cuda9x"}, "there is no device 'cuda9x'"),
        ({"dtype": "float23"}, "there is no dtype 'float23' (did you mean float32"),
    ],
)
def test_options_are_checked(checkpoint: Checkpoint, option: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        load_model(checkpoint("gpt2"), **option)
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none(checkpoint: Checkpoint):
    with pytest.raises(UsageError, match="no CUDA device"):
        load_model(checkpoint("gpt2"), device="cuda")
    assert load_model(checkpoint("gpt2"), check=False).device.type == "cpu"


@pytest.mark.gpu
def test_on_cuda_the_type_of_the_file_is_kept(tmp_path: Path):
    build_hf("llama").bfloat16().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.device.type == "cuda"
    assert model.dtype == torch.bfloat16


def test_the_progress_bars_of_transformers_stay_as_they_were(checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str]):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_model(checkpoint("gpt2"), check=False)
    assert logging.is_progress_bar_enabled() == before
    assert "it/s" not in capfd.readouterr().err


def test_loading_leaves_the_random_state_alone(checkpoint: Checkpoint):
    folder = checkpoint("llama")
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(before, torch.get_rng_state())
