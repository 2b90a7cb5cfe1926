"""The two shapes of the organism: a GPT-2 and a Llama with grouped heads, of about a million parameters each.

Both have 4 layers of width 128 with 4 heads, tied embeddings and 128 positions. Weights are drawn here, from a
generator of their own, because the library's own initialisation draws from the global one:
normal(0, 0.02), and 0.02 / sqrt(2 layers) for matrices that write into the residual stream.
"""

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from mechun.errors import UsageError, nearest
from mechun.organism.tokens import CONTEXT_LENGTH

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Architecture = Literal["gpt2", "llama"]
ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "llama")
N_LAYERS, WIDTH, N_HEADS, N_KV_HEADS, GATED_WIDTH = 4, 128, 4, 2, 384
_SPREAD = 0.02
_WRITERS = ("c_proj.weight", "o_proj.weight", "down_proj.weight")


def build_model(architecture: str, vocabulary_size: int, seed: int, n_layers: int = N_LAYERS) -> "PreTrainedModel":
    """An untrained model in float32.

    Args:
        architecture: "gpt2" or "llama".
        vocabulary_size: Entries of the tokenizer.
        seed: Of the weights.
        n_layers: Depth.

    Raises:
        UsageError: No such architecture.
    """
    from transformers import AutoModelForCausalLM

    config = make_config(architecture, vocabulary_size, n_layers)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                scale = 1 / math.sqrt(2 * n_layers) if name.endswith(_WRITERS) else 1.0
                weight.normal_(0.0, _SPREAD * scale, generator=generator)
    return model.float()


def make_config(architecture: str, vocabulary_size: int, n_layers: int = N_LAYERS) -> "PretrainedConfig":
    """The configuration of one architecture."""
    from transformers import GPT2Config, LlamaConfig

    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True}
    if architecture == "gpt2":
        dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape: dict[str, Any] = {"n_positions": CONTEXT_LENGTH, "n_embd": WIDTH, "n_layer": n_layers, "n_head": N_HEADS}
        return GPT2Config(vocab_size=vocabulary_size, **shape, **dropout, **special)
    if architecture == "llama":
        return LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=WIDTH,
            intermediate_size=GATED_WIDTH,
            num_hidden_layers=n_layers,
            num_attention_heads=N_HEADS,
            num_key_value_heads=N_KV_HEADS,
            max_position_embeddings=CONTEXT_LENGTH,
            **special,
        )
    raise UsageError(f"the organism has no architecture {architecture!r}", nearest(architecture, ARCHITECTURES))
