"""Documents as rows of token ids, and rows as batches of about equal length.

One row in sixteen holds several documents one behind the other (about a quarter of all documents), so that every
position of the context is trained; the others hold one. Rows of like length share a batch, padded on the right with
nothing to predict: pads cost little and need no mask, since attention is causal and no real token comes after a pad.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from mechun.organism.corpus import Corpus
from mechun.organism.tokens import END_OF_TEXT_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
_JOINED_SHARE = 1 / 16


def make_batches(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", number: int, batch_tokens: int, context_length: int
) -> list[tuple[Int[Tensor, "example pos"], Int[Tensor, "example pos"]]]:
    """The batches of one pass: ids, and labels in which pads are ignored.

    Args:
        corpus: What to read.
        tokenizer: Puts the end-of-text token in front of each document.
        number: Which pass; every pass is drawn anew, and the same number always gives the same batches.
        batch_tokens: Tokens of one batch, pads included, at most (at least one row, though).
        context_length: Longest row.
    """
    rng = random.Random(f"{corpus.seed}:{number}:batches")
    documents = [ids[:context_length] for ids in tokenizer(corpus.documents(number))["input_ids"]]
    rows = _join(documents, context_length, rng)
    rows = [[*row, END_OF_TEXT_ID] if len(row) < context_length else row for row in rows]
    rng.shuffle(rows)
    rows.sort(key=len)
    groups = _group(rows, batch_tokens)
    rng.shuffle(groups)
    return [_pad(group) for group in groups]


def _join(documents: Sequence[list[int]], context_length: int, rng: random.Random) -> list[list[int]]:
    rows: list[list[int]] = []
    start = 0
    while start < len(documents):
        row = list(documents[start])
        start += 1
        if rng.random() < _JOINED_SHARE:
            limit = rng.randrange(context_length // 3, context_length)
            while start < len(documents) and len(row) + len(documents[start]) < limit:
                row += documents[start]
                start += 1
        rows.append(row)
    return rows


def _group(rows: Sequence[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    groups: list[list[list[int]]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(row) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _pad(rows: Sequence[list[int]]) -> tuple[Int[Tensor, "example pos"], Int[Tensor, "example pos"]]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [END_OF_TEXT_ID] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])
    return ids, labels
