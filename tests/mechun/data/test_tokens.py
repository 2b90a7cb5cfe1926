"""Prompt, answer and subject stand at the right tokens, whatever the tokenizer does at the borders."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mechun.data.tokens import NO_PREDICTOR, NO_TOKENS, Question, Tokens, find_subject, join_answer, tokenize_questions
from mechun.errors import UsageError
from tests.toy_text import train_tokenizer

BPE = train_tokenizer()
BARE = train_tokenizer(bos=False)


def make_unit_tokenizer(vocab: list[str], *, template: str | None = None) -> Any:
    """Longest match over whole texts, so that a token may run over any border."""
    core = Tokenizer(
        models.Unigram(
            [("<s>", 0.0), ("</s>", 0.0), *((piece, -float(len(vocab)) + i) for i, piece in enumerate(vocab))]
        )
    )
    if template:
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def make_metaspace_tokenizer() -> Any:
    """Word pieces that begin with a block, as sentencepiece makes them."""
    words = ["<s>", "</s>", "<unk>", "▁The", "▁capital", "▁is", "▁Par", "is", "▁", "5", "a"]
    core = Tokenizer(models.Unigram([(word, -1.0 if len(word) > 1 else -4.0) for word in words], unk_id=2))
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def split(question: Question, tokenizer: Any = BPE, **options: Any) -> tuple[str, str, str | None]:
    """The texts of prompt, answer and subject tokens."""
    (tokens,) = tokenize_questions([question], tokenizer, **options)
    assert isinstance(tokens, Tokens), tokens
    subject = tokens.subject and tokenizer.decode(tokens.ids[slice(*tokens.subject)])
    prompt = tokens.ids[tokens.prompt_start : tokens.answer_start]
    return tokenizer.decode(prompt), tokenizer.decode(tokens.answer), subject


def refuse(question: Question, tokenizer: Any = BPE) -> str:
    (reason,) = tokenize_questions([question], tokenizer)
    assert isinstance(reason, str)
    return reason


def test_a_hand_made_case():
    question = Question("The capital of France is", "Paris, of course", "France")
    (tokens,) = tokenize_questions([question], BPE)
    assert isinstance(tokens, Tokens)
    pieces = ["<s>", "The", " capital", " of", " France", " is", " Paris", ",", " of", " course"]
    assert [BPE.decode([i]) for i in tokens.ids] == pieces
    assert (tokens.prompt_start, tokens.answer_start, tokens.subject) == (1, 6, (4, 5))
    assert list(tokens.ids) == BPE("The capital of France is Paris, of course")["input_ids"]


def test_a_tokenizer_without_bos_gets_none():
    (tokens,) = tokenize_questions([Question("The capital", "of France")], BARE)
    assert isinstance(tokens, Tokens)
    assert tokens.prompt_start == 0
    assert list(tokens.ids) == BARE("The capital of France")["input_ids"]


def test_an_end_token_behind_the_answer_is_left_out():
    tokenizer = make_unit_tokenizer(["a", "b", " ", "c"], template="<s> $A </s>")
    (tokens,) = tokenize_questions([Question("a", "b")], tokenizer)
    assert isinstance(tokens, Tokens)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["<s>", "a", " ", "b"]
    assert tokenizer.convert_ids_to_tokens(tokens.answer) == [" ", "b"]


def test_the_last_occurrence_of_the_subject_counts():
    prompt = "France, France and Italy: the capital of France is"
    (tokens,) = tokenize_questions([Question(prompt, "Paris", "France")], BPE)
    assert isinstance(tokens, Tokens)
    assert tokens.subject is not None
    assert BPE.decode(tokens.ids[tokens.subject[0] :]) == " France is Paris"


def test_a_subject_of_many_tokens_takes_its_lone_space_along():
    assert split(Question("The capital of Xyz is", "Q", "Xyz"))[2] == " Xyz"


def test_a_subject_in_other_letters_is_found_and_a_missing_one_is_not():
    assert split(Question("THE CAPITAL of FRANCE is", "Paris", "France"))[2] == " FRANCE"
    assert split(Question("The capital is", "Paris", "France"))[2] is None
    assert find_subject("İstanbul is", "istanbul") is None


def test_letters_of_several_bytes():
    assert split(Question("Die Hauptstadt der Schweiz heißt", "Zürich – nein", "Schweiz")) == (
        "Die Hauptstadt der Schweiz heißt",
        " Zürich – nein",
        " Schweiz",
    )


def test_a_prompt_that_ends_in_white_space_gets_no_second_space():
    assert join_answer("A:\n", "Paris") == "A:\nParis"
    assert join_answer("", "Paris") == "Paris"
    assert split(Question("A:\n", "Paris"))[:2] == ("A:\n", "Paris")


def test_a_space_that_ends_the_prompt_is_the_joining_one():
    questions = [Question(prompt, "Paris", "France") for prompt in ("capital of France", "capital of France ")]
    assert len(set(tokenize_questions(questions, BPE))) == 1


def test_a_token_over_the_border_is_refused():
    merging = make_unit_tokenizer(["x", "y", " ", "x y"])
    assert (
        refuse(Question("x", "y"), merging)
        == "one token holds both the end of the prompt and the beginning of the answer"
    )
    merged_newline = make_unit_tokenizer(["x", "y", "\n", "\ny"])
    assert "one token holds both" in refuse(Question("x\n", "y"), merged_newline)


def test_a_token_that_ends_with_the_joining_space_is_the_prompts():
    spaced = make_unit_tokenizer(["x", "y", " ", "x "])
    assert split(Question("y x", "y"), spaced)[1] == "y"


def test_what_has_no_tokens_or_no_predictor_is_refused():
    assert refuse(Question("", "Paris"), BARE) == NO_PREDICTOR
    assert split(Question("", "Paris"), BPE)[1] == "Paris"
    silent = make_unit_tokenizer(["x", " "])
    silent.backend_tokenizer.normalizer = normalizers.Replace("y", "")
    assert refuse(Question("x ", "y"), silent) == NO_TOKENS


def test_metaspace_offsets():
    tokenizer = make_metaspace_tokenizer()
    (tokens,) = tokenize_questions([Question("The capital is", "Paris")], tokenizer)
    assert isinstance(tokens, Tokens)
    assert tokenizer.convert_ids_to_tokens(tokens.answer) == ["▁Par", "is"]
    (tokens,) = tokenize_questions([Question("The capital is", "5", "capital")], tokenizer)
    assert isinstance(tokens, Tokens)
    assert tokenizer.convert_ids_to_tokens(tokens.answer) == ["▁", "5"]
    assert tokenizer.convert_ids_to_tokens(tokens.ids[slice(*tokens.subject)]) == ["▁capital"]


class Slow:
    """A tokenizer that tells no offsets."""

    is_fast = False

    def __init__(self, fast: Any):
        self.fast = fast

    def __call__(self, text: str, **options: Any) -> Any:
        return self.fast(text, **options)


@pytest.mark.parametrize("fast", [BPE, BARE])
def test_without_offsets_prefixes_give_the_same(fast: Any):
    questions = [
        Question("The capital of France is", "Paris, of course", "France"),
        Question("The capital of Xyz is", "Rome", "The capital"),
        Question("A:\n", "Oslo", "Norway"),
    ]
    assert tokenize_questions(questions, Slow(fast)) == tokenize_questions(questions, fast)


def test_without_offsets_a_changed_border_is_refused():
    merging = Slow(make_unit_tokenizer(["a", "x", "y", " ", "x y"]))
    assert "tells no offsets" in refuse(Question("x", "y"), merging)
    assert refuse(Question("", "Paris"), Slow(BARE)) == NO_PREDICTOR


def test_a_chat_template_frames_the_prompt():
    tokenizer = train_tokenizer()
    with pytest.raises(UsageError, match="no chat template"):
        tokenize_questions([Question("The capital is", "Paris")], tokenizer, chat=True)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (tokens,) = tokenize_questions([Question("capital of France?", "Paris", "France")], tokenizer, chat=True)
    assert isinstance(tokens, Tokens)
    assert tokenizer.decode(tokens.ids) == "<s>user: capital of France?\nassistant: Paris"
    assert tokens.ids.count(0) == 1
    assert tokenizer.decode(tokens.answer) == " Paris"
    assert tokenizer.decode(tokens.ids[slice(*tokens.subject)]) == " France"


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(prompt=texts, answer=texts.filter(str.strip), subject=texts)
def test_the_parts_are_the_joined_text(prompt: str, answer: str, subject: str):
    """Whatever is accepted decodes to the prompt and the answer; nothing is lost and nothing is double."""
    question = Question(f"{subject} {prompt}".rstrip(" "), answer, subject)
    (tokens,) = tokenize_questions([question], BPE)
    if isinstance(tokens, Tokens):
        text = join_answer(question.prompt, answer)
        assert list(tokens.ids) == BPE(text)["input_ids"]
        assert BPE.decode(tokens.answer).endswith(answer)
        assert BPE.decode(tokens.ids[1 : tokens.answer_start]) == text[: len(text) - len(BPE.decode(tokens.answer))]


def test_no_questions_give_no_tokens():
    assert tokenize_questions([], SimpleNamespace()) == []
