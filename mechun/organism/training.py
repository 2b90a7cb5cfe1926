"""Training an organism: one command, seeded, resumable.

Hidden matrices are moved by torch's own Muon (momentum, then the nearest orthogonal matrix), everything else by AdamW;
both rates follow one cosine after a short warm-up, gradients are clipped at 1, no dropout. Muon: Jordan 2024.

After every few passes the weights and the optimisers' state go into one safetensors file; a later call with the same
recipe goes on from there, and ends with the same weights as a run that was never interrupted.

Trap: orthogonalisation costs about as much as a backward pass at this width, so fewer, larger batches pay off.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechun.organism.architecture import N_LAYERS, build_model
from mechun.organism.batches import IGNORED, make_batches
from mechun.organism.bundle import save_model
from mechun.organism.corpus import Corpus, make_facts
from mechun.organism.recall import list_prompts, measure_recall
from mechun.organism.tokens import train_tokenizer
from mechun.organism.world import World, make_world

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_CHECKPOINT = "checkpoint.safetensors"
_REINIT_SEED = 1000
_EMBEDDINGS = ("wte.weight", "wpe.weight", "embed_tokens.weight", "lm_head.weight")
QUICK = {"n_people": 20, "n_layers": 2, "passes": 16, "batch_tokens": 512, "muon_rate": 0.012, "adam_rate": 0.006}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        architecture: "gpt2" or "llama".
        gold: Leave out every document that names a forgotten person.
        init_seed: Of the first weights.
        data_seed: Of the order of documents and of the grammar's sentences.
        n_people: Size of the world.
        n_layers: Depth of the model.
        world_seed: Of the world.
        passes: How often the corpus is read.
        batch_tokens: Tokens of a step.
        muon_rate: Highest rate for hidden matrices.
        adam_rate: Highest rate for everything else.
        weight_decay: Of both.
        warmup: Share of the steps in which the rate rises.
        newton_steps: Steps of Muon's orthogonalisation.
    """

    architecture: str = "gpt2"
    gold: bool = False
    init_seed: int = 0
    data_seed: int = 0
    n_people: int = 96
    n_layers: int = N_LAYERS
    world_seed: int = 0
    passes: int = 22
    batch_tokens: int = 1024
    muon_rate: float = 0.006
    adam_rate: float = 0.003
    weight_decay: float = 0.1
    warmup: float = 0.03
    newton_steps: int = 4


def train_organism(
    folder: str | Path,
    architecture: str = "gpt2",
    gold: bool = False,
    reinit: bool = False,
    seed: int = 0,
    quick: bool = False,
    resume: bool = True,
    progress: bool = True,
    save_every: int = 4,
    **changes: object,
) -> Path:
    """Train one model of the organism's world and save it as a Hugging Face folder.

    Args:
        folder: Where the model goes; also holds the checkpoint while training runs.
        architecture: "gpt2" or "llama".
        gold: Leave the forgotten people out of the corpus.
        reinit: Start from other weights than a run with the same seed and without this does.
        seed: Of the first weights and of the order of the text; the world stays the same.
        quick: A world of 20 people and two layers, in about a minute.
        resume: Go on from the checkpoint in the folder if its recipe is the same.
        progress: Show a bar with an estimate on stderr.
        save_every: Passes between checkpoints.
        changes: Other fields of `Recipe`.

    Returns:
        The folder.

    Example:
        >>> train_organism("my-organism", quick=True)  # doctest: +SKIP
        PosixPath('my-organism')
    """
    init_seed = seed + _REINIT_SEED if reinit else seed
    recipe = Recipe(architecture=architecture, gold=gold, init_seed=init_seed, data_seed=seed)
    if quick:
        recipe = replace(recipe, **QUICK)  # type: ignore[arg-type]
    recipe = replace(recipe, **changes)  # type: ignore[arg-type]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(recipe.n_people, recipe.world_seed)
    tokenizer = train_tokenizer(Corpus(world))
    model = build_model(recipe.architecture, len(tokenizer), recipe.init_seed, recipe.n_layers)
    trainer = _Trainer(recipe, world, model, tokenizer, folder, save_every)
    start = trainer.restore() if resume else 0
    trainer.run(start, progress)
    save_model(model, tokenizer, folder, asdict(recipe))
    make_facts(world).save(folder / "facts.jsonl")
    (folder / _CHECKPOINT).unlink(missing_ok=True)
    return folder


class _Trainer:
    """One training run: the model, both optimisers, and where they stand."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerFast",
        folder: Path,
        save_every: int,
    ):
        self.recipe, self.world, self.model, self.tokenizer = recipe, world, model, tokenizer
        self.folder, self.save_every = folder, save_every
        self.corpus = Corpus(world, gold=recipe.gold, seed=recipe.data_seed)
        self.optimisers = _make_optimisers(model, recipe)
        self.probe = _choose_probe(world, recipe.gold)

    def run(self, start: int, progress: bool) -> None:
        """Read the passes from `start` on, saving a checkpoint now and then."""
        from tqdm import tqdm

        recipe = self.recipe
        self.model.train()
        bar = tqdm(total=recipe.passes, initial=start, disable=not progress, unit="pass", desc=self.folder.name)
        for number in range(start, recipe.passes):
            loss = self._read_pass(number)
            if progress and ((number + 1) % 4 == 0 or number + 1 == recipe.passes):
                bar.set_postfix(loss=f"{loss:.3f}", recall=f"{self._measure_probe():.2f}")
            bar.update()
            if (number + 1) % self.save_every == 0 and number + 1 < recipe.passes:
                self.save(number + 1)
        bar.close()
        self.model.eval()

    def _read_pass(self, number: int) -> float:
        batches = make_batches(
            self.corpus, self.tokenizer, number, self.recipe.batch_tokens, self.model.config.max_position_embeddings
        )
        total = 0.0
        for step, (ids, labels) in enumerate(batches):
            self._set_rate((number + step / len(batches)) / self.recipe.passes)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()
            total += loss.item()
        return total / len(batches)

    def _set_rate(self, done: float) -> None:
        """Set both rates for a point of the run, as a share of all passes."""
        warm = min(1.0, (done + 1e-4) / self.recipe.warmup)
        share = warm * 0.5 * (1 + math.cos(math.pi * done))
        for optimiser, rate in zip(self.optimisers, (self.recipe.muon_rate, self.recipe.adam_rate), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * share

    def _measure_probe(self) -> float:
        self.model.eval()
        right = measure_recall(self.model, self.tokenizer, *self.probe)
        self.model.train()
        return float(right.float().mean())

    def save(self, number: int) -> None:
        """Write weights and optimiser state beside the checkpoint, then put them in its place."""
        from safetensors.torch import save_file

        tensors = {f"weight/{name}": weight.detach() for name, weight in self.model.named_parameters()}
        for row, optimiser in enumerate(self.optimisers):
            tensors |= dict(_state_tensors(row, optimiser))
        target, beside = self.folder / _CHECKPOINT, self.folder / f"{_CHECKPOINT}.part"
        save_file(tensors, beside, {"recipe": json.dumps(asdict(self.recipe)), "passes": str(number)})
        os.replace(beside, target)

    def restore(self) -> int:
        """Load the checkpoint if there is one of the same recipe; returns the passes already read."""
        from safetensors import safe_open

        path = self.folder / _CHECKPOINT
        if not path.exists():
            return 0
        with safe_open(path, "pt") as stored:
            meta = stored.metadata()
            if json.loads(meta["recipe"]) != asdict(self.recipe):
                return 0
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    weight.copy_(stored.get_tensor(f"weight/{name}"))
            for key in stored.keys():  # noqa: SIM118 - not a mapping
                if not key.startswith("weight/"):
                    self._restore_state(key, stored.get_tensor(key))
        return int(meta["passes"])

    def _restore_state(self, key: str, tensor: Tensor) -> None:
        _, row, place, name = key.split("/")
        optimiser = self.optimisers[int(row)]
        parameters = [weight for group in optimiser.param_groups for weight in group["params"]]
        optimiser.state[parameters[int(place)]][name] = tensor


def _state_tensors(row: int, optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    parameters = [weight for group in optimiser.param_groups for weight in group["params"]]
    for place, weight in enumerate(parameters):
        for name, tensor in optimiser.state[weight].items():
            yield f"state/{row}/{place}/{name}", tensor.detach().contiguous()


def _make_optimisers(model: "PreTrainedModel", recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    hidden, others, plain = [], [], []
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and not name.endswith(_EMBEDDINGS):
            hidden.append(weight)
        else:
            (others if weight.ndim == 2 else plain).append(weight)
    muon = torch.optim.Muon(
        hidden,
        lr=recipe.muon_rate,
        weight_decay=recipe.weight_decay,
        ns_steps=recipe.newton_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [{"params": others, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return muon, torch.optim.AdamW(groups, lr=recipe.adam_rate, betas=(0.9, 0.98), fused=True)


def _choose_probe(world: World, gold: bool) -> tuple[list[str], list[str]]:
    """Prompts that are never trained, of facts that are: what the progress bar shows."""
    facts = make_facts(world).where(lambda f: f.split == "retain" or (f.split == "forget" and not gold))
    pairs = list_prompts(facts.sample(150), trained=False)[::3]
    return [prompt for _, prompt in pairs], [fact.answer for fact, _ in pairs]
