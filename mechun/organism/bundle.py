"""The folder the package ships: six small models in 16 bits, their facts, and the card.

Every model has an ordinary Hugging Face folder of its own, with the tokenizer; `facts.jsonl` and `card.json` stand
beside them. Weights are stored as float16, which changed the answer to 1 of 3,696 prompts when it was tried (a GPT-2
after 20 of 22 passes); bfloat16, with three bits less of mantissa, changed 6.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechun.data.facts import Facts
from mechun.errors import DataError, ModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("gpt2", "gpt2-gold", "gpt2-gold-reinit", "llama", "llama-gold", "llama-gold-reinit")
RECIPE = "recipe.json"


def save_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", folder: str | Path, recipe: dict[str, Any]
) -> Path:
    """Write a model in float16 with its tokenizer and recipe; the model itself is left as it is."""
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().to(torch.float16).contiguous() for name, weight in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures, config.dtype = [type(model).__name__], torch.float16
    config.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)
    _name_tokenizer_class(folder / "tokenizer_config.json")
    (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return folder


def _name_tokenizer_class(path: Path) -> None:
    """Name the class that every version of the library knows; the newest writes one that older ones do not."""
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_model(
    name: str | Path, folder: str | Path | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """A shipped model in float32, ready for measuring, and its tokenizer.

    Args:
        name: One of `NAMES`, or the folder of a model.
        folder: Where the named models are; the shipped ones when None.

    Raises:
        ModelError: No such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mechun.organism.tokens import load_tokenizer

    path = Path(name) if Path(name).is_dir() else Path(folder or WEIGHTS) / name
    if not (path / "model.safetensors").exists():
        raise ModelError(f"no organism is called {str(name)!r}", nearest(str(name), NAMES))
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    return model.eval(), load_tokenizer(path)


def read_facts(folder: str | Path | None = None) -> Facts:
    """The facts of the bundle, every split."""
    return Facts.load(Path(folder or WEIGHTS) / "facts.jsonl")


def read_card(folder: str | Path | None = None) -> dict[str, Any]:
    """What the card states: `figures`, a flat list of named numbers with tolerances, and what is not shown.

    Raises:
        DataError: The folder has no card.
    """
    path = Path(folder or WEIGHTS) / "card.json"
    if not path.exists():
        raise DataError(f"{path.parent} has no card.json", "write one with mechun.organism.card.write_card(folder)")
    return json.loads(path.read_text(encoding="utf-8"))
