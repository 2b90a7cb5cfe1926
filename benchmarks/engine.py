"""How much the attribution engine costs beside the bare model.

    python benchmarks/engine.py                    the organism's shape, batches of 8 and 32
    python benchmarks/engine.py --shape gpt2       GPT-2 small
    python benchmarks/engine.py --memory           peak memory above the model, each in a process of its own

The bare cost of m points is 1 + m forward passes and m backward passes of the same bridge with frozen parameters,
logits everywhere. Times are CPU time of this process, interleaved, medians; "prefix" shares a third of the tokens.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from circuits.engine import attribute_edges
from circuits.graph import Graph
from circuits.hooks import frozen
from circuits.metrics import answer_log_prob
from circuits.types import ContrastPairs
from tests.toys import boot_bridge, draw_pairs, make_tokenizer

SHAPES = {
    "organism": dict(n_layer=4, n_embd=128, n_head=4, vocab_size=1024, n_positions=64),
    "gpt2": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, n_positions=128),
}


def build_model(shape: str) -> Any:
    """A GPT-2 of a shape with random weights, as a bridge."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**SHAPES[shape], bos_token_id=1, eos_token_id=1)
    config.architectures = ["GPT2LMHeadModel"]
    return boot_bridge(GPT2LMHeadModel(config).eval(), make_tokenizer())


def make_pairs(shape: str, batch: int, width: int, shared: int) -> ContrastPairs:
    """Contrasts whose first `shared` tokens are common and whose answer is the last two."""
    pairs = draw_pairs(batch, width, vocab=SHAPES[shape]["vocab_size"])
    corrupt = pairs.clean.clone()
    corrupt[:, shared : shared + 4] = 3 + (corrupt[:, shared : shared + 4] + 1) % 30
    return replace(pairs, corrupt=corrupt)


def run_bare(model: Any, pairs: ContrastPairs, points: int) -> None:
    """1 + m forward passes and m backward passes; gradients of activations only."""
    mask = pairs.attention_mask.long()
    places = pairs.answer_positions.unsqueeze(-1)

    def start(x: torch.Tensor, hook: Any) -> torch.Tensor:
        del hook
        leaf.append(x.detach().requires_grad_())
        return leaf[-1]

    with frozen(model):
        with torch.no_grad():
            model(pairs.clean, attention_mask=mask)
        for _ in range(points):
            leaf: list[torch.Tensor] = []
            with model.hooks(fwd_hooks=[("hook_embed", start)]):
                logits = model(pairs.clean, attention_mask=mask)
            logits = logits.gather(1, places.expand(-1, -1, logits.shape[-1]))
            torch.autograd.grad(answer_log_prob(logits, pairs).sum(), leaf)


def compare(shape: str, batch: int, width: int, repeats: int, model: Any) -> None:
    """Print the table of one size."""
    apart, common = make_pairs(shape, batch, width, 1), make_pairs(shape, batch, width, width // 3)
    graph = Graph.from_cfg(model.cfg)
    work: dict[str, Callable[[], Any]] = {
        "bare, 5 points": lambda: run_bare(model, apart, 5),
        "bare, 1 point": lambda: run_bare(model, apart, 1),
        "EAP-IG 5, looped": lambda: attribute_edges(model, apart, graph, points=5, stack=False, share_prefix=False),
        "EAP-IG 5": lambda: attribute_edges(model, apart, graph, points=5, share_prefix=False),
        "EAP-IG 5, right rule": lambda: attribute_edges(
            model, apart, graph, points=5, rule="right", share_prefix=False
        ),
        "EAP-IG 5, prefix": lambda: attribute_edges(model, common, graph, points=5),
        "EAP": lambda: attribute_edges(model, apart, graph, share_prefix=False),
        "EAP, prefix": lambda: attribute_edges(model, common, graph),
    }
    for task in work.values():
        task()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, task in work.items():
            begin = time.process_time()
            task()
            times[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    single = torch.cat([attribute_edges(model, apart.select([i]), graph, points=5) for i in range(min(batch, 4))])
    whole = attribute_edges(model, apart, graph, points=5)[: len(single)]
    print(f"{shape}, batch {batch}, {width} tokens, {torch.get_num_threads()} threads, medians of {repeats}")
    for name, value in medians.items():
        print(f"  {name:22s} {value:8.3f} CPU-s   {value / medians['bare, 5 points']:.2f} of bare")
    print(f"  batched against one at a time: {float((whole - single).norm() / single.norm()):.1e}")


def measure_memory(shape: str, batch: int, width: int, what: str) -> None:
    """Print the peak memory that one task needs above the model; meant for a process of its own."""
    model = build_model(shape)
    pairs = make_pairs(shape, batch, width, 1)
    run_bare(model, pairs.select([0]), 1) if what == "bare" else attribute_edges(model, pairs.select([0]), points=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "bare":
        run_bare(model, pairs, 5)
    else:
        stack: Any = {"looped": False, "auto": "auto", "stacked": True}[what]
        attribute_edges(model, pairs, points=5, stack=stack, share_prefix=False)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="organism")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--task", choices=["bare", "looped", "auto", "stacked"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.task:
        measure_memory(asked.shape, asked.batch[0], asked.width, asked.task)
    elif asked.memory:
        for batch in asked.batch:
            peaks: dict[str, float] = {}
            for task in ("bare", "looped", "auto", "stacked"):
                flags = ["--shape", asked.shape, "--batch", str(batch), "--width", str(asked.width), "--task", task]
                out = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
                peaks[task] = float(out.stdout.split()[-1])
            shares = ", ".join(f"{task} {peak:.0f} MB ({peak / peaks['bare']:.2f})" for task, peak in peaks.items())
            print(f"{asked.shape}, batch {batch}, {asked.width} tokens, peak above the model: {shares}")
    else:
        model = build_model(asked.shape)
        for batch in asked.batch:
            compare(asked.shape, batch, asked.width, asked.repeats, model)


if __name__ == "__main__":
    main()
