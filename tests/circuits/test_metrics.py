"""The metrics against arithmetic written out, one example at a time."""

from dataclasses import replace

import pytest
import torch

from circuits.metrics import METRICS
from tests.toys import VOCAB, draw_pairs


def draw_logits(seed: int) -> torch.Tensor:
    return torch.randn(3, 2, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_metrics_against_arithmetic():
    pairs, logits, clean = draw_pairs(3), draw_logits(0), draw_logits(1)
    for row in range(3):
        a, b = pairs.answer_ids[row].tolist()
        log = logits[row].log_softmax(-1)
        mean = (log[0, a] + log[1, b]) / 2
        assert torch.isclose(METRICS["answer_log_prob"](logits, pairs, None)[row], mean)
        assert torch.isclose(METRICS["answer_prob"](logits, pairs, None)[row], mean.exp())
        before = METRICS["answer_prob"](clean, pairs, None)[row]
        assert torch.isclose(METRICS["gmprob_kl"](logits, pairs, clean)[row], before.exp() * (before - mean.exp()))
        p = clean[row].softmax(-1)
        assert torch.isclose(METRICS["kl_to_clean"](logits, pairs, clean)[row], -(p * (p.log() - log)).sum(-1).mean())
        ranks = [(logits[row, i] > logits[row, i, t]).sum() for i, t in enumerate((a, b))]
        assert METRICS["rank"](logits, pairs, None)[row] == -sum(ranks) / 2


def test_the_logit_difference_is_read_at_the_first_token_that_differs():
    pairs, logits = draw_pairs(3), draw_logits(0)
    pairs = replace(pairs, foil_ids=torch.stack([pairs.answer_ids[:, 0], (pairs.answer_ids[:, 1] + 1) % VOCAB], 1))
    for row in range(3):
        expected = logits[row, 1, pairs.answer_ids[row, 1]] - logits[row, 1, pairs.foil_ids[row, 1]]
        assert METRICS["logit_difference"](logits, pairs, None)[row] == expected
    with pytest.raises(ValueError, match="e0, e1, e2"):
        METRICS["logit_difference"](logits, replace(pairs, foil_ids=pairs.answer_ids), None)
    with pytest.raises(ValueError, match="foil"):
        METRICS["logit_difference"](logits, replace(pairs, foil_mask=torch.zeros(3, 2, dtype=torch.bool)), None)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_padded_answers_do_not_count(name):
    pairs, logits, clean = draw_pairs(3), draw_logits(0), draw_logits(1)
    mask = torch.tensor([[True, False]] * 3)
    short = replace(pairs, answer_mask=mask)
    alone = replace(
        pairs,
        answer_ids=pairs.answer_ids[:, :1],
        answer_mask=mask[:, :1],
        answer_positions=pairs.answer_positions[:, :1],
    )
    other = logits.clone()
    other[:, 1] = torch.nan
    expected = METRICS[name](logits[:, :1], alone, clean[:, :1])
    assert torch.allclose(METRICS[name](other, short, clean), expected)


def test_metrics_that_compare_with_the_clean_run_ask_for_it():
    for name in ("gmprob_kl", "kl_to_clean"):
        with pytest.raises(ValueError, match=name):
            METRICS[name](draw_logits(0), draw_pairs(3), None)


def test_sixteen_bit_logits_are_summed_in_thirty_two():
    logits = draw_logits(0).bfloat16()
    assert METRICS["answer_log_prob"](logits, draw_pairs(3), None).dtype == torch.float32
