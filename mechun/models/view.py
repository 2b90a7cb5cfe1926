"""A model ready for use: the plain Hugging Face module, its tokenizer, and a hooked view of the same weights.

`hf` is the truth: it is what optimisers see and what is saved. `bridge` is a view for looking inside, made when first
asked for and made anew when an update would leave it behind. Token ids come from `tokenizer`, never from the bridge.
Fingerprint: sha256 over the configuration and the raw bytes of every parameter, in order of name.
"""

import hashlib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mechun.models.twin import boot_bridge, stamp_weights

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNLIMITED = 1 << 20
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


class LoadedModel:
    """What all of `mechun` passes around.

    Attributes:
        hf: The plain Hugging Face model, in evaluation mode; the only thing to train, edit and save.
        tokenizer: The model's own tokenizer, untouched.
        name: What the model was called when it was asked for.
        fingerprint: Digest of configuration and weights as they were at load.

    Example:
        >>> model = load_model("organism")
        >>> logits = model.bridge(ids, attention_mask=mask)
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: Any, name: str):
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = self.measure_fingerprint()
        self._bridge: Any = None
        self._copies = False
        self._stamp: Hashable = None

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.hf.parameters())
        kind, dtype = self.hf.config.model_type, str(self.dtype).removeprefix("torch.")
        what = f"{kind}, {size / 1e6:.1f}M parameters, {dtype} on {self.device}"
        return f"LoadedModel({self.name}: {what}, {self.fingerprint[:8]})"

    @property
    def bridge(self) -> Any:
        """The hooked view of the current weights (`TransformerBridge`).

        Booted when first asked for, which costs seconds once, and again after an update in place where the weights are
        fused. So ask for it anew after an update, and do not keep hooks or flags on it across one. Update weights as
        optimisers do; a write through `parameter.data` leaves no trace to go by. Gradients of weights belong to `hf`.
        """
        if self._bridge is None or self._stamp != stamp_weights(self.hf, contents=self._copies):
            self._bridge, self._copies = boot_bridge(self.hf, self.tokenizer)
            self._stamp = stamp_weights(self.hf, contents=self._copies)
        return self._bridge

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.hf.dtype

    @property
    def context_length(self) -> int:
        """How many tokens the model can read at once; 2**20 where its configuration sets no limit."""
        config = self.hf.config.get_text_config()
        return next((int(value) for name in LENGTHS if (value := getattr(config, name, None))), UNLIMITED)

    @property
    def n_embeddings(self) -> int:
        """How many token ids have an embedding."""
        weight: Any = self.hf.get_input_embeddings().weight
        return int(weight.shape[0])

    @property
    def has_experts(self) -> bool:
        """Whether its MLPs are mixtures of experts, so that `mlp.hook_post` does not hold neurons."""
        config = self.hf.config.get_text_config()
        return any((getattr(config, name, None) or 0) > 1 for name in EXPERTS)

    def measure_fingerprint(self) -> str:
        """Digest of the configuration and of the weights as they are now; reads every weight once."""
        config = {key: value for key, value in self.hf.config.to_dict().items() if key not in VOLATILE}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, parameter in sorted(self.hf.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(raw_bytes(parameter))
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> Path:
        """Write a Hugging Face folder, weights and tokenizer, that `load_model` and other libraries read."""
        self.hf.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return Path(folder)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data
