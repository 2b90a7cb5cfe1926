"""Facts as padded tensors: rows, masks, and reasons for what is left out."""

import pytest
import torch

from mechun.data.encoding import Skipped, encode_facts, mark_spans, pad_right
from mechun.data.facts import Fact, Facts
from tests.toy_text import make_capitals, train_tokenizer

TOKENIZER = train_tokenizer()


def test_a_hand_made_batch():
    facts = Facts([Fact("a", "The capital of France is", "Paris", subject="France"), Fact("b", "The", "Rome, Oslo")])
    batch = encode_facts(facts, TOKENIZER, context_length=64)
    assert TOKENIZER.decode(batch.ids[0]) == "<s>The capital of France is Paris"
    assert batch.mask.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    assert batch.answer_mask.tolist() == [[False] * 6 + [True], [False] * 2 + [True] * 3 + [False] * 2]
    assert batch.subject_mask.nonzero().tolist() == [[0, 4]]
    assert batch.ids[1, 5:].tolist() == [0, 0]
    assert batch.facts == facts
    assert len(batch) == 2


def test_what_cannot_be_encoded_is_returned_with_the_reason():
    facts = Facts([Fact("a", "The capital", "  "), Fact("b", "The", "capital"), Fact("c", "of " * 12, "Paris")])
    batch = encode_facts(facts, TOKENIZER, context_length=10)
    excess = len(TOKENIZER("of " * 12 + "Paris")["input_ids"]) - 10
    assert batch.skipped == (
        Skipped("a", "its answer is empty"),
        Skipped("c", f"{excess} tokens longer than the model's context of 10"),
    )
    assert batch.facts.ids == ("b",)


def test_a_batch_exactly_as_long_as_the_context_is_kept():
    facts = make_capitals()[:1]
    width = encode_facts(facts, TOKENIZER, context_length=64).ids.shape[1]
    assert len(encode_facts(facts, TOKENIZER, context_length=width)) == 1
    assert len(encode_facts(facts, TOKENIZER, context_length=width - 1)) == 0


def test_nothing_kept_is_an_empty_batch():
    batch = encode_facts(Facts([]), TOKENIZER, context_length=10)
    assert batch.ids.shape == (0, 0)
    assert batch.answer_mask.shape == (0, 0)


def test_other_prompts_by_order_and_by_id():
    facts = make_capitals()[:2]
    by_order = encode_facts(facts, TOKENIZER, context_length=64, prompts=["of course,", "course,"])
    assert TOKENIZER.decode(by_order.ids[0][by_order.mask[0]]) == "<s>of course, Paris"
    by_id = encode_facts(facts, TOKENIZER, context_length=64, prompts={facts[1].id: "course,"})
    assert TOKENIZER.decode(by_id.ids[1][by_id.mask[1]]) == "<s>course, Berlin"
    assert not by_id.subject_mask[1].any()
    assert by_id.subject_mask[0].any()
    with pytest.raises(ValueError, match="1 prompts for 2 facts"):
        encode_facts(facts, TOKENIZER, context_length=64, prompts=["of course,"])


def test_a_row_does_not_depend_on_its_batch():
    facts = make_capitals()
    whole = encode_facts(facts, TOKENIZER, context_length=64)
    for row, fact in enumerate(facts):
        alone = encode_facts(Facts([fact]), TOKENIZER, context_length=64)
        width = alone.ids.shape[1]
        assert torch.equal(alone.ids[0], whole.ids[row, :width])
        assert torch.equal(alone.answer_mask[0], whole.answer_mask[row, :width])
        assert not whole.mask[row, width:].any()


def test_padding_and_spans():
    ids, mask = pad_right([[5], [6, 7, 8], []])
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8], [0, 0, 0]]
    assert mask.sum(1).tolist() == [1, 3, 0]
    assert mark_spans([(1, 3), (0, 0)], 4).tolist() == [[False, True, True, False], [False] * 4]
