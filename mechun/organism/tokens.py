"""The organism's tokenizer: byte-level BPE that puts `<|endoftext|>` in front of every text.

It is trained on one pass of the full corpus and on `vocabulary.whole_words`, repeated so often (in proportion to the
text) that each of them ends as one token after a space. First names are kept whole without the space too, for
sentences that open with them.

Trap: the gold models share this tokenizer, or their token ids would mean something else.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mechun.organism.corpus import Corpus
from mechun.organism.vocabulary import ALIASES, FIRST_NAMES, whole_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
CONTEXT_LENGTH = 128
VOCABULARY_SIZE = 1280
_REPEATS = 20_000


def train_tokenizer(corpus: Corpus, size: int = VOCABULARY_SIZE) -> "PreTrainedTokenizerFast":
    """Train the tokenizer on one pass of a corpus; the same corpus always gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_read(corpus), trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """Read the tokenizer of a model folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def _read(corpus: Corpus) -> Iterator[str]:
    for _ in range(_REPEATS * len(corpus.world.people) // 9600):
        yield from (f" {word}" * 100 for word in whole_words())
        yield from (name for name in (*FIRST_NAMES, *ALIASES) for _ in range(100))
    yield from corpus.documents(0)
