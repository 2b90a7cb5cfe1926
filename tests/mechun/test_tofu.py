"""The main job on a published forget set, with a model trained on that text alone.

The text is the annotated forget10 part of TOFU (Maini et al., arXiv 2401.06121), 367 questions about 20 invented
authors with answers of many tokens. It is not part of the project: the test skips where it is absent.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

TOFU = Path(__file__).parents[2].parent / "shared" / "data" / "tofu_forget10_entities.json"
PASSES, BATCH, RATE = 18, 8, 3e-3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOFU.exists(), reason=f"{TOFU.name} is not beside the checkout in shared/data"),
]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer GPT-2 that has learnt the questions and answers by heart, in about 100 CPU-seconds."""
    texts = [f"{row['question']} {row['answer']}" for row in json.loads(TOFU.read_text(encoding="utf-8"))]
    tokenizer = train_tokenizer(texts)
    shape = {"n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **still))
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    steps = PASSES * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    for _ in range(PASSES):
        for batch in torch.randperm(len(rows), generator=generator).split(BATCH):
            ids = pad_sequence([rows[i] for i in batch], batch_first=True)
            mask = pad_sequence([torch.ones_like(rows[i]) for i in batch], batch_first=True)
            logits = model(ids, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits[mask[:, 1:] > 0], ids[:, 1:][mask[:, 1:] > 0])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    folder = tmp_path_factory.mktemp("tofu") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_main_job_scores_every_question_of_a_published_forget_set(checkpoint: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "mechun", "score", "--model", str(checkpoint), "--forget", str(TOFU), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    questions = json.loads(TOFU.read_text(encoding="utf-8"))
    assert [row["prompt"] for row in rows if row["rank"] == 1], "nothing is ranked first"
    assert {row["prompt"] for row in rows} == {question["question"] for question in questions}
    scores = [row["score"] for row in rows]
    assert all(0 <= score <= 1 for score in scores)
    assert max(scores) - min(scores) > 0.2, "the scores do not tell the facts apart"
    assert "grouped by author" in done.stderr
    assert "noise" in done.stderr, "how facts without a subject are contrasted must be said aloud"
