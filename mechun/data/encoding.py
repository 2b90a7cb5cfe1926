"""Facts as token tensors, with the answer's tokens marked exactly.

Each fact is its prompt, one space, and its answer, tokenised together (`mechun.data.tokens`), padded on the right. What
cannot be encoded exactly is not dropped silently: it is returned in `skipped`, with the reason. Trap: the mask must be
passed to the model; pads are ordinary token ids to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechun.data.facts import Fact, Facts
from mechun.data.tokens import Question, Tokens, tokenize_questions


@dataclass(frozen=True)
class Skipped:
    """A fact that was left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Encoded:
    """Facts as one padded batch of token ids.

    Attributes:
        ids: Prompt and answer of each fact; real tokens on the left.
        mask: True on real tokens.
        answer_mask: True on the answer's tokens; the logits one position earlier predict them.
        subject_mask: True on the subject's tokens in the prompt; all False where the subject is unknown.
        facts: The facts of the rows.
        skipped: The facts that could not be encoded.
    """

    ids: Int[Tensor, "example pos"]
    mask: Bool[Tensor, "example pos"]
    answer_mask: Bool[Tensor, "example pos"]
    subject_mask: Bool[Tensor, "example pos"]
    facts: Facts
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.facts)


def encode_facts(
    facts: Facts,
    tokenizer: Any,
    *,
    context_length: int,
    prompts: Mapping[str, str] | Sequence[str] | None = None,
    chat: bool = False,
) -> Encoded:
    """Token ids of every fact with its answer appended, right padded, the answer's tokens marked.

    Args:
        facts: The facts, in the order of the rows.
        tokenizer: A Hugging Face tokenizer; a BOS token is put in front exactly where it does so itself.
        context_length: Facts with more tokens are skipped.
        prompts: Other prompts than the facts' own, such as paraphrases: one per fact in order, or by the fact's id.
        chat: Put the prompts through the tokenizer's chat template.

    Returns:
        The batch, and the facts that were skipped with the reason: the answer has no tokens, shares one with the
        prompt, has none before it, or the whole is longer than the context.

    Example:
        >>> batch = encode_facts(facts, model.tokenizer, context_length=model.context_length)
        >>> model.hf(batch.ids, attention_mask=batch.mask).logits
    """
    texts = pick_prompts(facts, prompts)
    kept, skipped = tokenize_facts(facts, tokenizer, texts, context_length=context_length, chat=chat)
    ids, mask = pad_right([tokens.ids for _, tokens in kept])
    answers = mark_spans([(tokens.answer_start, len(tokens)) for _, tokens in kept], ids.shape[1])
    subjects = mark_spans([tokens.subject or (0, 0) for _, tokens in kept], ids.shape[1])
    return Encoded(ids, mask, answers, subjects, Facts(fact for fact, _ in kept), tuple(skipped))


def pick_prompts(facts: Facts, prompts: Mapping[str, str] | Sequence[str] | None) -> list[str]:
    """One prompt per fact, the fact's own where no other is given."""
    if prompts is None:
        return [fact.prompt for fact in facts]
    if isinstance(prompts, Mapping):
        return [prompts.get(fact.id, fact.prompt) for fact in facts]
    if len(prompts) != len(facts):
        raise ValueError(f"{len(prompts)} prompts for {len(facts)} facts")
    return list(prompts)


def tokenize_facts(
    facts: Iterable[Fact], tokenizer: Any, prompts: Sequence[str], *, context_length: int, chat: bool = False
) -> tuple[list[tuple[Fact, Tokens]], list[Skipped]]:
    """Each fact with its tokens, and the facts that have to be left out."""
    facts = list(facts)
    questions = [Question(prompt, fact.answer, fact.subject) for fact, prompt in zip(facts, prompts, strict=True)]
    kept: list[tuple[Fact, Tokens]] = []
    skipped: list[Skipped] = []
    for fact, tokens in zip(facts, tokenize_questions(questions, tokenizer, chat=chat), strict=True):
        if not fact.answer.strip():
            skipped.append(Skipped(fact.id, "its answer is empty"))
        elif isinstance(tokens, str):
            skipped.append(Skipped(fact.id, tokens))
        elif len(tokens) > context_length:
            excess = len(tokens) - context_length
            skipped.append(Skipped(fact.id, f"{excess} tokens longer than the model's context of {context_length}"))
        else:
            kept.append((fact, tokens))
    return kept, skipped


def pad_right(
    rows: Sequence[Sequence[int]], *, width: int | None = None
) -> tuple[Int[Tensor, "example pos"], Bool[Tensor, "example pos"]]:
    """Rows of ids as one tensor with zeros on the right, and the mask of what is real."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long).reshape(len(rows), width)
    return ids, mark_spans([(0, len(row)) for row in rows], width)


def mark_spans(spans: Sequence[tuple[int, int]], width: int) -> Bool[Tensor, "example pos"]:
    """True from each span's first index up to before its second."""
    bounds = torch.tensor(spans, dtype=torch.long).reshape(len(spans), 2)
    index = torch.arange(width)
    return (index >= bounds[:, :1]) & (index < bounds[:, 1:])
