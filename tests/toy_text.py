"""A small byte-level tokenizer trained in memory, and a small world of facts to ask about."""

from typing import Any

from mechun.data.facts import Fact, Facts

CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Norway": "Oslo", "New Zealand": "Wellington"}
TEXTS = [f"The capital of {country} is {city}, of course." for country, city in CAPITALS.items()]


def train_tokenizer(texts: list[str] = TEXTS, *, bos: bool = True, size: int = 400) -> Any:
    """A byte-pair tokenizer of the texts' words; with `bos` it puts `<s>` in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    core.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def make_capitals() -> Facts:
    """One fact per country, with subject and relation."""
    return Facts(
        Fact(country.lower(), f"The capital of {country} is", city, subject=country, relation="capital")
        for country, city in CAPITALS.items()
    )
