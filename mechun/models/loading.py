"""Loading a model from a name, a folder or a module, and refusing what cannot be used.

A checkpoint loads into the plain Hugging Face class for causal language models: safetensors only, no code of the
checkpoint, no network once the files are there. Trap: Transformers fills weights that a checkpoint lacks with random
numbers and goes on; here that is refused.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mechun.errors import ModelError, UsageError, nearest
from mechun.models.checkpoints import Checkpoint, fetch_snapshot, find_checkpoint, is_hub_id
from mechun.models.checks import check_model
from mechun.models.view import LoadedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_model(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    check: bool = True,
) -> LoadedModel:
    """A model with its tokenizer and its hooked view, checked.

    Args:
        source: The name of a shipped model ("organism", "organism-llama", ...), a folder, a Hub id
            `org/name[@revision]`, or a Hugging Face module, which is used as it is.
        tokenizer: A tokenizer, or the folder or Hub id of one; by default the checkpoint's own. A module in memory
            needs one, unless it was loaded from a folder that has one.
        device: "auto" takes CUDA where there is one, then the CPU; a module in memory stays where it is.
        dtype: "auto" keeps the checkpoint's type on CUDA and widens 16 bits to float32 on the CPU; the shipped models
            are always float32. A module in memory keeps its type.
        check: Verify once, on a few tokens, that the view gives the model's own logits, that padding changes nothing
            and that layers add up (a second or two, and it imports TransformerLens).

    Raises:
        ModelError: When the model cannot be found, read, or looked into; the message says why.
        UsageError: On an unknown device or dtype.

    Example:
        >>> load_model("organism").context_length
        64
    """
    place = pick_device(device) if device != "auto" or not isinstance(source, PreTrainedModel) else None
    kind = pick_dtype(dtype)
    if isinstance(source, PreTrainedModel):
        hf, name, home = source, source.name_or_path or type(source).__name__, source.name_or_path
        torch.nn.Module.to(hf, place or hf.device, kind or hf.dtype)
    else:
        checkpoint = find_checkpoint(source)
        assert place is not None
        hf, name, home = read_weights(checkpoint, place, kind), checkpoint.name, checkpoint.folder
    loaded = LoadedModel(hf, load_tokenizer(home if tokenizer is None else tokenizer), name)
    check_model(loaded, view=check)
    return loaded


def read_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """The plain model of a checkpoint folder; every weight must come from the file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with named_faults(checkpoint.name), without_progress_bars():
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise ModelError(f"{checkpoint.name} is quantised: its weights cannot be edited", "use the full weights")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype or "auto",
            # Only the eager path caps attention scores, so any other would not be the model that was trained.
            attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else None,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
    for fault in ("missing_keys", "mismatched_keys"):
        if report.get(fault):
            first = sorted(map(str, report[fault]))[0]
            raise ModelError(f"the weights of {checkpoint.name} do not fit its config.json", f"{fault}: {first}, ...")
    narrow = model.dtype in (torch.float16, torch.bfloat16)
    if dtype is None and narrow and (checkpoint.shipped or device.type == "cpu"):
        model = model.float()
    return model.to(device)


def load_tokenizer(source: Any) -> Any:
    """A tokenizer from a folder or Hub id; a tokenizer is returned as it is."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if source in ("", None):
        raise ModelError("the model comes without a tokenizer", "pass tokenizer=")
    folder = Path(source)
    if not folder.is_dir():
        if not is_hub_id(str(source)):
            raise ModelError(f"there is no tokenizer folder {source}")
        folder = fetch_snapshot(str(source))
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(f"{folder} holds no tokenizer", "save one there, or pass tokenizer=")
    with named_faults(str(folder)):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def pick_device(device: str | torch.device) -> torch.device:
    """The device asked for; "auto" takes CUDA where there is one, then the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as fault:
        raise UsageError(
            f"there is no device {str(device)!r}", nearest(str(device), ["auto", "cpu", "cuda"])
        ) from fault
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("this machine has no CUDA device", "use --device cpu or auto")
    return place


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype asked for; None for "auto"."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype if isinstance(dtype, torch.dtype) else None
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype {dtype!r}", nearest(dtype, ["auto", *DTYPES]))
    return DTYPES[dtype]


@contextlib.contextmanager
def named_faults(name: str) -> Generator[None]:
    """Faults of Transformers as a `ModelError` that names the model and gives the first line of the reason."""
    try:
        yield
    except ModelError:
        raise
    except Exception as fault:  # Transformers and safetensors raise dozens of classes for a broken folder
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        if "trust_remote_code" in str(fault):
            reason = "it needs code of its own, which is never run"
        raise ModelError(f"{name} cannot be loaded: {reason}") from fault


@contextlib.contextmanager
def without_progress_bars() -> Generator[None]:
    """Transformers' own bars off, and as they were afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
