"""Where prompt, subject and answer stand among the tokens of one question.

Prompt and answer are tokenised together, joined by one space, because that is the text a model would have read: the
tokens of two texts put side by side need not be the tokens of the joined text. Token spans come from the character
offsets of the tokenizer. A token that holds characters of both makes the answer inexact, and the question is refused.
Tokenizers without offsets are compared by prefixes; what that cannot settle exactly is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mechun.errors import UsageError

NO_TOKENS = "its answer has no tokens"
NO_PREDICTOR = "no token stands before its answer, so nothing predicts it"


@dataclass(frozen=True)
class Question:
    """A prompt, the answer that follows it, and what it is about."""

    prompt: str
    answer: str
    subject: str | None = None


@dataclass(frozen=True)
class Tokens:
    """The token ids of a question with its answer, and what stands where.

    Attributes:
        ids: Special tokens in front as the tokenizer puts them, none behind.
        prompt_start: Number of special tokens in front.
        answer_start: Index of the answer's first token; the answer runs to the end.
        subject: First token of the subject's last occurrence in the prompt and the one after it; None when unknown.
    """

    ids: tuple[int, ...]
    prompt_start: int
    answer_start: int
    subject: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer's token ids."""
        return self.ids[self.answer_start :]


def tokenize_questions(questions: Sequence[Question], tokenizer: Any, *, chat: bool = False) -> list[Tokens | str]:
    """The tokens of each question, or the reason why its answer cannot be told exactly from its prompt.

    Args:
        questions: Prompt, answer and subject of each; a space that ends the prompt is taken as the joining one.
        tokenizer: A Hugging Face tokenizer.
        chat: Put the prompt through the tokenizer's chat template, as the user's turn.

    Raises:
        UsageError: When a chat template is asked for and the tokenizer has none.
    """
    if not questions:
        return []
    prompts = [render_chat(q.prompt, tokenizer) if chat else q.prompt.removesuffix(" ") for q in questions]
    texts = [join_answer(prompt, q.answer) for prompt, q in zip(prompts, questions, strict=True)]
    if not getattr(tokenizer, "is_fast", False):
        return [
            split_by_prefix(prompt, text, q.subject, tokenizer, special=not chat)
            for prompt, text, q in zip(prompts, texts, questions, strict=True)
        ]
    encoded = tokenizer(
        texts,
        # The template writes its special tokens itself.
        add_special_tokens=not chat,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    return [
        split_by_offsets(
            encoded["input_ids"][row],
            encoded["offset_mapping"][row],
            [bool(flag) for flag in encoded["special_tokens_mask"][row]],
            (len(prompts[row]), len(texts[row]) - len(question.answer)),
            widen_span(prompts[row], find_subject(prompts[row], question.subject)),
        )
        for row, question in enumerate(questions)
    ]


def render_chat(prompt: str, tokenizer: Any) -> str:
    """The prompt as the user's turn, up to where the assistant's turn begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template", "leave out chat")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def join_answer(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, with one space between them unless the prompt is empty or ends in white space."""
    return prompt + ("" if not prompt or prompt[-1].isspace() else " ") + answer


def find_subject(prompt: str, subject: str | None) -> tuple[int, int] | None:
    """Character span of the subject's last occurrence in the prompt; any letter case if need be."""
    if not subject:
        return None
    start = prompt.rfind(subject)
    if start < 0 and len(prompt.lower()) == len(prompt):
        start = prompt.lower().rfind(subject.lower())
    return (start, start + len(subject)) if start >= 0 else None


def widen_span(text: str, span: tuple[int, int] | None) -> tuple[int, int] | None:
    """The span with the space before it, which most tokenizers make part of the word; a lone space is a token of it."""
    if span and span[0] and text[span[0] - 1] == " ":
        return (span[0] - 1, span[1])
    return span


def split_by_offsets(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    special: Sequence[bool],
    border: tuple[int, int],
    subject: tuple[int, int] | None,
) -> Tokens | str:
    """The spans of one question from the character offsets of its tokens.

    The border is where the prompt's characters end and where the answer's begin.
    """
    real = [index for index, flag in enumerate(special) if not flag]
    # An empty offset is a token without characters of its own, such as a lone joining space.
    after = [i for i in real if offsets[i][1] > border[0]]
    if not after:
        return NO_TOKENS
    start, stop = after[0], real[-1] + 1
    first = offsets[start]
    if first[0] < border[0]:
        if first[1] > border[1]:
            return "one token holds both the end of the prompt and the beginning of the answer"
        start += 1  # the token ends with the joining space: it is the prompt's
    if start >= stop or offsets[stop - 1][1] <= border[1]:
        return NO_TOKENS
    if start == 0:
        return NO_PREDICTOR
    span = None
    if subject:
        inside = [i for i in real if i < start and offsets[i][0] < subject[1] and offsets[i][1] > subject[0]]
        span = (inside[0], inside[-1] + 1) if inside else None
    return Tokens(tuple(ids[:stop]), real[0], start, span)


def split_by_prefix(prompt: str, text: str, subject: str | None, tokenizer: Any, *, special: bool) -> Tokens | str:
    """The spans of one question where the tokenizer tells no offsets: parts must be exact prefixes of the whole."""

    def encode(part: str) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    whole, before = encode(text), encode(prompt)
    front = find_front(tokenizer) if special else ()
    if whole[: len(before)] != before:
        return "the tokenizer tells no offsets, and the prompt's tokens change when the answer follows"
    if len(whole) == len(before):
        return NO_TOKENS
    if not front and not before:
        return NO_PREDICTOR
    span = None
    if found := find_subject(prompt, subject):
        left, right = encode(prompt[: found[0]].rstrip()), encode(prompt[: found[1]])
        if before[: len(right)] == right and right[: len(left)] == left and len(left) < len(right):
            span = (len(front) + len(left), len(front) + len(right))
    return Tokens(front + whole, len(front), len(front) + len(before), span)


def find_front(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts in front of every text."""
    ids = tuple(tokenizer("a", verbose=False)["input_ids"])
    bare = tuple(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    return next((ids[:n] for n in range(len(ids)) if ids[n : n + len(bare)] == bare), ())
