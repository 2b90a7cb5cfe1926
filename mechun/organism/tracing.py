"""Where is a fact looked up? Causal tracing of an organism, with its positive control.

The embeddings of the subject's tokens get Gaussian noise of three standard deviations; then the residual stream after
one layer is put back as it was in the clean run, at some of the positions. Recovery is
(p(restored) - p(corrupt)) / (p(clean) - p(corrupt)) of the answer's first token, pooled over facts.
Paper: Meng et al. 2022 (ROME), section 2. Restoring every position must give exactly 1: the positive control.

Trap: restoring after the last layer at the last position gives 1 by construction, whatever was looked up where.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechun.data.facts import Fact, Facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NOISE = 3.0
PLACES = ("every", "subject", "subject_last", "subject_before_last", "last")


@torch.no_grad()
def trace_facts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    facts: Facts,
    n_noises: int = 4,
    seed: int = 0,
) -> Mapping[tuple[str, int], float]:
    """Share of the answer's probability that comes back, by place and layer.

    Args:
        model: A GPT-2 or a Llama.
        tokenizer: Its tokenizer.
        facts: Facts whose subject stands in their prompt.
        n_noises: Draws of the noise per fact.
        seed: Of the noise.

    Returns:
        Recovery by place (see `PLACES`) and number of the layer after which the stream was restored.
    """
    layers = list_layers(model)
    gained = {(place, layer): 0.0 for place in PLACES for layer in range(len(layers))}
    lost = 0.0
    generator = torch.Generator().manual_seed(seed)
    embedding: Any = model.get_input_embeddings()
    spread = NOISE * embedding.weight.std()
    for fact in facts:
        ids, answer, subject = _encode(fact, tokenizer)
        streams: list[Tensor] = []
        with _recorded(layers, streams):
            clean = _answer_probability(model, ids, answer)
        shape = (n_noises, ids.shape[1], model.config.hidden_size)
        noise = torch.randn(shape, generator=generator) * spread * subject[None, :, None]
        many = ids.repeat(n_noises, 1)
        with _noised(embedding, noise):
            corrupt = _answer_probability(model, many, answer)
            lost += clean - corrupt
            for place, layer in gained:
                with _restored(layers[layer], streams[layer], _choose_places(place, subject)):
                    gained[place, layer] += _answer_probability(model, many, answer) - corrupt
    return {key: value / lost for key, value in gained.items()}


def list_layers(model: "PreTrainedModel") -> list[nn.Module]:
    """The blocks of a GPT-2 or a Llama, in order."""
    body: Any = model.base_model
    return list(body.h if hasattr(body, "h") else body.layers)


def _encode(
    fact: Fact, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[Int[Tensor, "one pos"], int, Bool[Tensor, "pos"]]:
    """Ids of the prompt, the first token of the answer, and where the subject stands."""
    assert fact.subject is not None
    encoded = tokenizer(f"{fact.prompt} {fact.answer}", return_offsets_mapping=True)
    spans = [end > start and end > len(fact.prompt) for start, end in encoded["offset_mapping"]]
    length = spans.index(True)
    begin = fact.prompt.index(fact.subject)
    inside = [
        end > start and begin < end and start < begin + len(fact.subject)
        for start, end in encoded["offset_mapping"][:length]
    ]
    return torch.tensor([encoded["input_ids"][:length]]), encoded["input_ids"][length], torch.tensor(inside)


def _choose_places(place: str, subject: Bool[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
    chosen = torch.zeros_like(subject)
    last = int(subject.nonzero().max())
    if place == "every":
        chosen[:] = True
    elif place == "last":
        chosen[-1] = True
    elif place == "subject_last":
        chosen[last] = True
    else:
        chosen |= subject
        chosen[last] = place == "subject"
    return chosen


def _answer_probability(model: "PreTrainedModel", ids: Int[Tensor, "example pos"], answer: int) -> float:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
    return float(logits.softmax(-1)[:, answer].mean())


def _stream(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _recorded(layers: Sequence[nn.Module], streams: list[Tensor]) -> Generator[None]:
    handles = [layer.register_forward_hook(lambda _m, _i, out: streams.append(_stream(out))) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _noised(embedding: nn.Module, noise: Float[Tensor, "example pos d_model"]) -> Generator[None]:
    def add(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output + noise

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _restored(layer: nn.Module, clean: Tensor, places: Bool[Tensor, "pos"]) -> Generator[None]:
    def restore(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
        stream = torch.where(places[None, :, None], clean, _stream(output))
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = layer.register_forward_hook(restore)
    try:
        yield
    finally:
        handle.remove()
