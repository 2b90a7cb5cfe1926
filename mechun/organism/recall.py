"""Does a model know a fact: is the answer what it says next?

A prompt is recalled when greedy continuation gives exactly the answer's tokens; with teacher forcing that is "at every
answer position the likeliest token is the right one", which needs one forward pass. Prompt and answer are tokenised
together, so that the split between them is the one the model was trained on.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechun.data.facts import Fact, Facts
from mechun.organism.corpus import draw_sentence
from mechun.organism.tokens import END_OF_TEXT_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def encode_prompts(
    prompts: Sequence[str], answers: Sequence[str], tokenizer: "PreTrainedTokenizerFast"
) -> tuple[Int[Tensor, "example pos"], Bool[Tensor, "example pos"]]:
    """Ids of prompt and answer, padded on the right, and a mask that is true on answer tokens."""
    texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    longest = max(map(len, encoded["input_ids"]))
    ids = torch.full((len(texts), longest), END_OF_TEXT_ID)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, (tokens, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = torch.tensor([end > len(prompts[row]) for _, end in offsets])
    return ids, mask


@torch.no_grad()
def measure_recall(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 256,
) -> Bool[Tensor, "example"]:
    """Whether each prompt is continued by its answer.

    Prompts of like length share a batch; the order of the result is the order of the prompts. About 2,000 prompts a
    second on one core.

    Example:
        >>> measure_recall(model, tokenizer, ["Mara Abel was born in the city of"], ["Rome"])  # doctest: +SKIP
        tensor([True])
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    right = torch.zeros(len(prompts), dtype=torch.bool)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = encode_prompts([prompts[r] for r in rows], [answers[r] for r in rows], tokenizer)
        guesses = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].argmax(-1)
        right[rows] = ((guesses == ids[:, 1:]) | ~mask[:, 1:]).all(-1)
    return right


def keep_recalled(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", facts: Facts) -> Facts:
    """The facts whose default prompt is continued with the answer."""
    right = measure_recall(model, tokenizer, [f.prompt for f in facts], [f.answer for f in facts])
    return Facts(fact for fact, ok in zip(facts, right.tolist(), strict=True) if ok)


def share_recalled(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", facts: Facts) -> float:
    """Share of the facts whose default prompt is continued with the answer."""
    return len(keep_recalled(model, tokenizer, facts)) / len(facts)


def list_prompts(facts: Facts, trained: bool | None = None) -> list[tuple[Fact, str]]:
    """Every fact with each of its prompts: all, only those literally in the corpus, or only those never in it."""
    pairs = [(fact, prompt) for fact in facts for prompt in (fact.prompt, *fact.paraphrases)]
    if trained is None:
        return pairs
    return [(fact, prompt) for fact, prompt in pairs if fact.meta["trained"][prompt] is trained]


@torch.no_grad()
def measure_grammar(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", n_sentences: int = 300, held_out: bool = True
) -> tuple[float, float]:
    """Loss per token on sentences of the grammar (nats), and the share in which the right form of the verb is likelier.

    Args:
        model: What is measured.
        tokenizer: Its tokenizer.
        n_sentences: How many sentences are drawn, always the same ones.
        held_out: Take the tenth that no corpus contains.
    """
    rng = random.Random(f"grammar:{held_out}")
    sentences = [draw_sentence(rng, held_out) for _ in range(n_sentences)]
    losses = token_losses(model, tokenizer, [sentence.text for sentence in sentences])
    right = answer_losses(model, tokenizer, [s.before for s in sentences], [s.verb for s in sentences])
    wrong = answer_losses(model, tokenizer, [s.before for s in sentences], [s.wrong for s in sentences])
    return float(losses.mean()), float((right < wrong).float().mean())


def token_losses(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]
) -> Float[Tensor, "token"]:
    """Negative log-probability of every token of the texts except the first, pads left out."""
    encoded = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    losses = _losses(model, encoded["input_ids"])
    return losses[encoded["attention_mask"][:, 1:].bool()]


def answer_losses(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", prompts: Sequence[str], answers: Sequence[str]
) -> Float[Tensor, "example"]:
    """Negative log-probability of each answer given its prompt, as the mean over the answer's tokens."""
    ids, mask = encode_prompts(prompts, answers, tokenizer)
    losses, mask = _losses(model, ids), mask[:, 1:]
    return (losses * mask).sum(-1) / mask.sum(-1)


def _losses(model: "PreTrainedModel", ids: Int[Tensor, "example pos"]) -> Float[Tensor, "example after"]:
    log_probs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].log_softmax(-1)
    return -log_probs.gather(-1, ids[:, 1:, None])[..., 0]
