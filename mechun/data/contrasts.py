"""Clean and corrupt inputs for facts: with one the model can know the answer, with the other it cannot.

`swap` puts another subject of the same relation into the question (`mechun.data.swaps`); its answer is the foil.
`noise` adds Gaussian noise to the token embeddings of the subject, three times the standard deviation of all embeddings
(causal tracing, Meng et al. 2022). `mean` and `zero` leave the tokens alone: the analysis replaces activations itself.
Corrupt runs keep the clean answer, so both runs are read at the same positions. Trap: whether the rest of the tokens
survives a swap depends on the tokenizer; what does not is skipped with the reason, or fitted and counted in the notes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.types import ContrastPairs
from mechun.data.encoding import Skipped, mark_spans, pad_right, tokenize_facts
from mechun.data.facts import Fact, Facts
from mechun.data.swaps import find_swaps, group_partners
from mechun.data.tokens import Question, Tokens, tokenize_questions
from mechun.errors import UsageError, nearest
from mechun.models import LoadedModel

KINDS = ("auto", "swap", "noise", "mean", "zero")
NOISE_SCALE = 3.0


@dataclass(frozen=True)
class Contrasts:
    """Facts as contrast pairs.

    Attributes:
        pairs: One row per contrast; with several contrasts per fact, those of a fact stand together.
        facts: The facts that have at least one contrast, in the order they came.
        fact_rows: For each contrast, the index of its fact in `facts`.
        skipped: The facts without a usable contrast, with the reason.
        kind: How the corrupt runs were made: "swap", "noise", "mean" or "zero".
        partners: For each contrast, the id of the fact whose subject was put in; empty unless swapped.
        shifts: For each contrast, by how many tokens that subject had to be cut (positive) or lengthened (negative).
        notes: What a user should be told.
    """

    pairs: ContrastPairs
    facts: Facts
    fact_rows: Int[Tensor, " example"]
    skipped: tuple[Skipped, ...]
    kind: str
    partners: tuple[str, ...]
    shifts: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def mean_by_fact(self, values: Float[Tensor, "example *rest"]) -> Float[Tensor, "fact *rest"]:
        """Average of what was measured on the contrasts of each fact."""
        rows = self.fact_rows.to(values.device)
        sums = values.new_zeros(len(self.facts), *values.shape[1:]).index_add(0, rows, values)
        counts = rows.bincount(minlength=len(self.facts)).to(values.dtype)
        return sums / counts.reshape(-1, *[1] * (values.dim() - 1))


@dataclass(frozen=True)
class Row:
    """One contrast before padding."""

    fact: Fact
    tokens: Tokens
    corrupt: tuple[int, ...]
    foil: str | None = None
    partner: str = ""
    shift: int = 0
    draw: int = 0


def contrast(
    facts: Facts,
    model: LoadedModel,
    *,
    kind: str = "auto",
    pool: Facts | None = None,
    seed: int = 0,
    n_swaps: int = 1,
) -> Contrasts:
    """Clean and corrupt token inputs of the facts.

    Args:
        facts: What to ask about.
        model: Gives the tokenizer, the context length and, for noise, the embeddings.
        kind: "swap", "noise", "mean" or "zero"; "auto" swaps when at least half of the pool names subjects and
            relations, and adds noise otherwise.
        pool: Where other subjects are taken from; the facts themselves when not given. Pass the whole set when facts
            come in chunks, so that a fact's contrast does not depend on its chunk.
        seed: With the fact's id, decides which partner or noise is drawn.
        n_swaps: Contrasts per fact, with different partners or noise; a fact with fewer possible partners has fewer.

    Raises:
        UsageError: On an unknown kind, or less than one contrast per fact.

    Example:
        >>> made = contrast(facts, model, pool=everything)
        >>> made.pairs.clean.shape == made.pairs.corrupt.shape
        True
    """
    if kind not in KINDS:
        raise UsageError(f"there is no contrast {kind!r}", nearest(kind, KINDS))
    if n_swaps < 1:
        raise UsageError(f"{n_swaps} contrasts per fact were asked for", "at least one is needed")
    pool = facts if pool is None else pool
    notes: list[str] = []
    if kind == "auto":
        kind = pick_kind(pool)
        notes.append(f"contrast: {kind}")
    prompts = [fact.prompt for fact in facts]
    kept, skipped = tokenize_facts(facts, model.tokenizer, prompts, context_length=model.context_length)
    if kind == "swap":
        rows, without = swap_rows(kept, pool, model.tokenizer, seed=seed, n=n_swaps)
        skipped = sorted([*skipped, *without], key=lambda skip: facts.ids.index(skip.id))
        if fitted := sum(row.shift != 0 for row in rows):
            notes.append(f"{fitted} of {len(rows)} swapped subjects have another number of tokens and were realigned")
    else:
        draws = n_swaps if kind == "noise" else 1
        rows = [Row(f, t, t.ids, f.foil, draw=draw) for f, t in kept for draw in range(draws)]
    if kind == "noise" and (unknown := sum(tokens.subject is None for _, tokens in kept)):
        notes.append(f"{unknown} of {len(kept)} facts have no known subject: noise on all tokens of their prompts")
    return assemble_contrasts(rows, model, kind, seed, tuple(skipped), tuple(notes))


def pick_kind(pool: Facts) -> str:
    """Swap when at least half of the facts name a subject and a relation, noise otherwise."""
    named = sum(bool(fact.subject and fact.relation) for fact in pool)
    return "swap" if pool and 2 * named >= len(pool) else "noise"


def swap_rows(
    kept: Sequence[tuple[Fact, Tokens]], pool: Facts, tokenizer: Any, *, seed: int, n: int
) -> tuple[list[Row], list[Skipped]]:
    """The swaps of each fact, and the facts that have none."""
    partners = group_partners(pool, tokenizer)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for fact, tokens in kept:
        swaps = find_swaps(fact, tokens, partners, tokenizer, n=n, seed=seed)
        if isinstance(swaps, str):
            skipped.append(Skipped(fact.id, swaps))
            continue
        rows += [
            Row(fact, tokens, swap.ids, swap.partner.answer, swap.partner.id, swap.shift, draw)
            for draw, swap in enumerate(swaps)
        ]
    return rows, skipped


def assemble_contrasts(
    rows: Sequence[Row], model: LoadedModel, kind: str, seed: int, skipped: tuple[Skipped, ...], notes: tuple[str, ...]
) -> Contrasts:
    """Rows as padded tensors."""
    clean, mask = pad_right([row.tokens.ids for row in rows])
    width = clean.shape[1]
    corrupt, _ = pad_right([row.corrupt for row in rows], width=width)
    answer_ids, answer_mask = pad_right([row.tokens.answer for row in rows])
    foil_ids, foil_mask = pad_right(tokenize_foils(rows, model.tokenizer))
    facts = Facts({row.fact.id: row.fact for row in rows}.values())
    index = {name: number for number, name in enumerate(facts.ids)}
    pairs = ContrastPairs(
        clean=clean,
        corrupt=corrupt,
        attention_mask=mask,
        answer_positions=place_answers(rows, answer_mask),
        answer_ids=answer_ids,
        answer_mask=answer_mask,
        foil_ids=foil_ids,
        foil_mask=foil_mask,
        subject_mask=mark_spans([row.tokens.subject or (0, 0) for row in rows], width),
        ids=tuple(row.fact.id if row.draw == 0 else f"{row.fact.id}#{row.draw + 1}" for row in rows),
        embedding_noise=draw_noise(rows, width, model, seed) if kind == "noise" else None,
    )
    return Contrasts(
        pairs=pairs,
        facts=facts,
        fact_rows=torch.tensor([index[row.fact.id] for row in rows], dtype=torch.long),
        skipped=skipped,
        kind=kind,
        partners=tuple(row.partner for row in rows),
        shifts=tuple(row.shift for row in rows),
        notes=notes,
    )


def place_answers(rows: Sequence[Row], answer_mask: Bool[Tensor, "example answer"]) -> Int[Tensor, "example answer"]:
    """The positions whose logits predict the answer's tokens: one before each; 0 beyond the answer."""
    starts = torch.tensor([row.tokens.answer_start for row in rows], dtype=torch.long).reshape(-1, 1)
    return (starts - 1 + torch.arange(answer_mask.shape[1])) * answer_mask


def tokenize_foils(rows: Sequence[Row], tokenizer: Any) -> list[tuple[int, ...]]:
    """The tokens of each wrong answer after the clean prompt; none where there is no wrong answer."""
    asked = [number for number, row in enumerate(rows) if row.foil]
    questions = [Question(rows[number].fact.prompt, str(rows[number].foil)) for number in asked]
    foils: list[tuple[int, ...]] = [()] * len(rows)
    for number, tokens in zip(asked, tokenize_questions(questions, tokenizer), strict=True):
        foils[number] = () if isinstance(tokens, str) else tokens.answer
    return foils


def draw_noise(rows: Sequence[Row], width: int, model: LoadedModel, seed: int) -> Float[Tensor, "example pos d_model"]:
    """Noise on the subject's tokens, or on every prompt token behind the BOS where the subject is unknown."""
    scale, d_model = measure_embeddings(model)
    noise = torch.zeros(len(rows), width, d_model)
    for number, row in enumerate(rows):
        start, stop = row.tokens.subject or (row.tokens.prompt_start, row.tokens.answer_start)
        generator = torch.Generator().manual_seed(derive_seed(seed, row.fact.id, row.draw))
        noise[number, start:stop] = NOISE_SCALE * scale * torch.randn(stop - start, d_model, generator=generator)
    return noise


@torch.no_grad()
def measure_embeddings(model: LoadedModel) -> tuple[float, int]:
    """Standard deviation of the token embeddings as they leave their layer, over 4096 tokens, and their width."""
    layer = model.hf.get_input_embeddings()
    step = max(1, model.n_embeddings // 4096)
    embeddings = layer(torch.arange(0, model.n_embeddings, step, device=model.device)).float()
    return embeddings.std().item(), embeddings.shape[-1]


def derive_seed(*parts: object) -> int:
    """A seed that depends on nothing but its parts, equal on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
