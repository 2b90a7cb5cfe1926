"""How firmly the answer is held: one number per example, from the logits at the answer's positions.

    answer_log_prob   mean over the answer's tokens of log p(token)                 (the default)
    answer_prob       exp of it: the geometric-mean probability of the answer
    gmprob_kl         exp(p_clean) * (p_clean - p), p = answer_prob                 (CUD parity)
    kl_to_clean       minus the mean KL(clean || here) over the answer's positions
    logit_difference  answer's logit minus foil's at the first token where they differ
    rank              minus the mean rank of the answer's tokens, 0 for the most likely

Larger means more firmly held, except for `gmprob_kl`, whose gradient is exactly `-exp(p_clean) * grad p`: the code it
follows (arXiv 2601.09624) calls a KL function with its log-target flag on plain probabilities. Traps: `kl_to_clean` has
no gradient at the clean input, and `rank` none anywhere.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.types import ContrastPairs, Metric

Logits = Float[Tensor, "example answer d_vocab"]


def answer_log_prob(logits: Logits, pairs: ContrastPairs, clean: Logits | None = None) -> Float[Tensor, "example"]:
    """Mean log-probability of the answer's tokens, in nats."""
    del clean
    picked = logits.gather(-1, pairs.answer_ids.unsqueeze(-1)).squeeze(-1)
    return _average(picked.to(_wide(logits)) - logits.to(_wide(logits)).logsumexp(-1), pairs)


def answer_prob(logits: Logits, pairs: ContrastPairs, clean: Logits | None = None) -> Float[Tensor, "example"]:
    """Geometric-mean probability of the answer's tokens."""
    return answer_log_prob(logits, pairs, clean).exp()


def gmprob_kl(logits: Logits, pairs: ContrastPairs, clean: Logits | None = None) -> Float[Tensor, "example"]:
    """`exp(p_clean) * (p_clean - p)`: grows as the answer is lost."""
    held = answer_prob(_need(clean, "gmprob_kl").detach(), pairs)
    return held.exp() * (held - answer_prob(logits, pairs))


def kl_to_clean(logits: Logits, pairs: ContrastPairs, clean: Logits | None = None) -> Float[Tensor, "example"]:
    """Minus the mean KL divergence from the clean run's distribution, in nats; 0 at the clean input."""
    target = _need(clean, "kl_to_clean").detach().to(_wide(logits)).log_softmax(-1)
    return -_average((target.exp() * (target - logits.to(_wide(logits)).log_softmax(-1))).sum(-1), pairs)


def logit_difference(logits: Logits, pairs: ContrastPairs, clean: Logits | None = None) -> Float[Tensor, "example"]:
    """Logit of the answer's token minus the foil's, at the first place where they differ.

    Raises:
        ValueError: An example has no foil, or one equal to its answer; the message names it.
    """
    del clean
    place, foil = _find_difference(pairs)
    here = logits.gather(1, place.view(-1, 1, 1).expand(-1, 1, logits.shape[-1])).squeeze(1).to(_wide(logits))
    answer = pairs.answer_ids.gather(1, place.unsqueeze(1))
    return (here.gather(1, answer) - here.gather(1, foil.unsqueeze(1))).squeeze(1)


def rank(logits: Logits, pairs: ContrastPairs, clean: Logits | None = None) -> Float[Tensor, "example"]:
    """Minus the mean rank of the answer's tokens among the vocabulary; it has no gradient."""
    del clean
    picked = logits.gather(-1, pairs.answer_ids.unsqueeze(-1))
    return -_average((logits > picked).sum(-1).to(_wide(logits)), pairs)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {f.__name__: f for f in (answer_log_prob, answer_prob, gmprob_kl, kl_to_clean, logit_difference, rank)}
)


def find_metric(metric: str | Metric) -> Metric:
    """The metric of a name; a function is returned as it is.

    Raises:
        KeyError: No metric has that name.
    """
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise KeyError(f"no metric {metric!r}: {', '.join(METRICS)}")
    return METRICS[metric]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _average(values: Float[Tensor, "example answer"], pairs: ContrastPairs) -> Float[Tensor, "example"]:
    kept = torch.where(pairs.answer_mask, values, torch.zeros_like(values))
    return kept.sum(-1) / pairs.answer_mask.sum(-1)


def _need(clean: Logits | None, name: str) -> Logits:
    if clean is None:
        raise ValueError(f"{name} compares with the clean run: pass its logits as the third argument")
    return clean


def _find_difference(pairs: ContrastPairs) -> tuple[Int[Tensor, "example"], Int[Tensor, "example"]]:
    """Place of the first token in which answer and foil differ, and the foil's token there."""
    width = min(pairs.answer_ids.shape[1], pairs.foil_ids.shape[1])
    both = pairs.answer_mask[:, :width] & pairs.foil_mask[:, :width]
    differ = both & (pairs.answer_ids[:, :width] != pairs.foil_ids[:, :width])
    missing = [name for name, found in zip(pairs.ids, differ.any(1).tolist(), strict=True) if not found]
    if missing:
        raise ValueError(
            f"logit_difference needs a foil that differs from the answer; none for {', '.join(missing[:8])}"
        )
    place = differ.int().argmax(1)
    return place, pairs.foil_ids.gather(1, place.unsqueeze(1)).squeeze(1)
