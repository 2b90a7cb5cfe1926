"""Reading and replacing activations of a `HookedModel`, with nothing left behind.

`tapping` attaches one function to each named hook for as long as its context lasts; what it does in a pass is set on
the `Tap` between passes, so that many passes cost one attachment. `frozen` holds parameters still: no weight gradients
are made and none of the activations that they would need is kept.

Traps of TransformerBridge 3.9: unknown names are ignored in silence (here: KeyError); q, k, v and z points hand out a
reshaped view that joins the graph only if the hook returns it; a hook at the input of a norm sees the branch, so a copy
returned there carries the branch's gradient alone.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from circuits.types import HookedModel

Edit = Callable[[Tensor], Tensor]


def check_hooks(model: HookedModel, names: Sequence[str]) -> dict[str, Any]:
    """The hook points of the given names; names that the model does not have are refused.

    Raises:
        KeyError: Names the unknown hook and its nearest neighbours.
    """
    known = model.hook_dict
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            raise KeyError(f"no hook {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return {name: known[name] for name in names}


@dataclass
class Tap:
    """What happens at the tapped hooks during a pass.

    Attributes:
        names: Names of the tapped hooks by the identity of their points.
        edits: Function by hook name; what it returns takes the activation's place.
        reading: Hooks whose activations are kept.
        branching: Hooks at which a copy is passed on, whose gradient is that of the branch alone.
        kept: The activations of the last pass, as the model went on with them.
    """

    names: Mapping[int, tuple[str, ...]]
    edits: Mapping[str, Edit] = field(default_factory=dict[str, Edit])
    reading: frozenset[str] = frozenset()
    branching: frozenset[str] = frozenset()
    kept: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def prepare(
        self,
        edits: Mapping[str, Edit] | None = None,
        reading: Sequence[str] = (),
        branching: Sequence[str] = (),
    ) -> None:
        """Forget the last pass and say what the next one shall do."""
        self.edits, self.kept = dict(edits or {}), {}
        self.branching = frozenset(branching)
        self.reading = frozenset(reading) | self.branching

    def handle(self, tensor: Tensor, hook: Any) -> Tensor:
        """The function at every tapped hook."""
        for name in self.names[id(hook)]:
            if name in self.edits:
                tensor = self.edits[name](tensor)
            if name in self.branching:
                tensor = tensor.view_as(tensor)
            if name in self.reading:
                self.kept[name] = tensor
        return tensor


@contextmanager
def tapping(model: HookedModel, names: Sequence[str]) -> Generator[Tap, None, None]:
    """Tap the named hooks while the context lasts.

    Raises:
        KeyError: The model has no such hook.

    Example:
        with tapping(model, ["hook_embed"]) as tap:
            tap.prepare(reading=["hook_embed"])
            model(ids, attention_mask=mask)
            embeddings = tap.kept["hook_embed"]
    """
    unique = tuple(dict.fromkeys(names))
    points = check_hooks(model, unique)
    by_point: dict[int, tuple[str, ...]] = {}
    for name, point in points.items():
        by_point[id(point)] = (*by_point.get(id(point), ()), name)
    tap = Tap(by_point)
    # one filter instead of a name per hook: a bridge builds its table of hooks anew for every entry
    with model.hooks(fwd_hooks=[(points.__contains__, tap.handle)]):
        try:
            yield tap
        finally:
            tap.prepare()


@contextmanager
def frozen(model: HookedModel) -> Generator[None, None, None]:
    """Hold every parameter still while the context lasts; `requires_grad` is as before afterwards.

    Raises:
        ValueError: The model is in training mode, where dropout would make every pass another function.
    """
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode: call model.eval() first")
    # a bridge's own parameters() leaves some of its split projections out
    modules: Iterator[torch.nn.Module] = model.modules() if isinstance(model, torch.nn.Module) else iter(())
    held = {id(p): p for m in modules for p in m.parameters(recurse=False) if p.requires_grad}
    try:
        for parameter in held.values():
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in held.values():
            parameter.requires_grad_(True)
