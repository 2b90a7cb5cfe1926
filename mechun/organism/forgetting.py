"""The organism's own answer to "suppressed or deleted?": forget crudely, relearn a part, look at the rest.

A model that was pushed off its facts (gradient ascent on the forget set, descent on kept facts) is trained on the facts
of a third of the forgotten people; then the facts of the others, which nobody showed it, come back. The gold model,
which never read about them, does not move. Also here: how many small steps one fact takes to be pushed off
(per-sample difficulty), to see whether that is a stable property.

Trap: rows of one table compare only at equal end points; these loops are measuring rods, not unlearning methods.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechun.data.facts import Fact, Facts
from mechun.organism.recall import encode_prompts, share_recalled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FORGOTTEN_LEVEL = 0.15


def suppress_facts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    forget: Facts,
    retain: Facts,
    rate: float = 2e-4,
    most_steps: int = 120,
    seed: int = 0,
) -> "PreTrainedModel":
    """A copy of the model, trained off the forget facts until at most `FORGOTTEN_LEVEL` of them is recalled.

    Ascent on 24 forget prompts minus descent on 48 kept ones per step, looked at after every second step.
    """
    model = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng = random.Random(seed)
    for step in range(most_steps):
        ascent = _answer_loss(model, *_encode(_draw(forget, 24, rng), tokenizer))
        descent = _answer_loss(model, *_encode(_draw(retain, 48, rng), tokenizer))
        optimiser.zero_grad()
        (descent - ascent).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 2 and share_recalled(model, tokenizer, forget) <= FORGOTTEN_LEVEL:
            break
    return model


def relearn_facts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    shown: Facts,
    watched: Facts,
    steps: Sequence[int] = (0, 5, 10, 20, 40),
    rate: float = 3e-4,
    seed: int = 0,
) -> Mapping[int, float]:
    """Recall of watched facts while a copy of the model is trained on others, by number of steps."""
    model = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng = random.Random(seed)
    curve = {}
    for step in range(max(steps) + 1):
        if step in steps:
            curve[step] = share_recalled(model, tokenizer, watched)
        optimiser.zero_grad()
        _answer_loss(model, *_encode(_draw(shown, 32, rng), tokenizer)).backward()
        optimiser.step()
    return curve


def split_people(facts: Facts, share: float = 1 / 3) -> tuple[Facts, Facts]:
    """Facts of a share of the couples, and those of the other couples: no couple is in both."""
    couples = sorted({fact.meta["couple"] for fact in facts})
    shown = set(couples[: round(len(couples) * share)])
    return facts.where(lambda f: f.meta["couple"] in shown), facts.where(lambda f: f.meta["couple"] not in shown)


def count_steps(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    fact: Fact,
    retain: Facts,
    rate: float,
    seed: int = 0,
    level: float = -3.0,
    most_steps: int = 400,
) -> int:
    """Steps of ascent on one prompt, with descent on 8 kept ones, until the answer's log-probability is below a level.

    Args:
        model: Left as it is.
        tokenizer: Its tokenizer.
        fact: What is pushed off, by its default prompt.
        retain: What the kept prompts are drawn from.
        rate: AdamW's rate; small enough that the median over facts exceeds 40 steps, or facts cannot be ranked.
        seed: Of the draw of kept prompts.
        level: Where to stop: mean log-probability of the answer's tokens, in nats.
        most_steps: Where to give up.
    """
    model = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng = random.Random(f"{seed}:{fact.id}")
    target = encode_prompts([fact.prompt], [fact.answer], tokenizer)
    for step in range(most_steps):
        ascent = _answer_loss(model, *target)
        if ascent.item() > -level:
            return step
        descent = _answer_loss(model, *_encode(_draw(retain, 8, rng), tokenizer))
        optimiser.zero_grad()
        (descent - ascent).backward()
        optimiser.step()
    return most_steps


def _draw(facts: Facts, n: int, rng: random.Random) -> list[tuple[str, str]]:
    """Prompts that are literally in the corpus, of n facts drawn with replacement."""
    drawn = []
    for _ in range(n):
        fact = facts[rng.randrange(len(facts))]
        prompts = [prompt for prompt, trained in fact.meta["trained"].items() if trained]
        drawn.append((rng.choice(prompts), fact.answer))
    return drawn


def _encode(
    pairs: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerFast"
) -> tuple[Int[Tensor, "example pos"], Bool[Tensor, "example pos"]]:
    return encode_prompts([prompt for prompt, _ in pairs], [answer for _, answer in pairs], tokenizer)


def _answer_loss(
    model: "PreTrainedModel", ids: Int[Tensor, "example pos"], mask: Bool[Tensor, "example pos"]
) -> Tensor:
    log_probs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
    return -picked[mask[:, 1:]].mean()
