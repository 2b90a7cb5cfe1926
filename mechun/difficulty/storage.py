"""Anchors as one safetensors file: tensors by name, everything else as JSON in the header; nothing can execute."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.graph import Graph
from mechun.difficulty.anchors import Anchors, Lessons
from mechun.difficulty.calibration import Calibration, EdgeFit
from mechun.difficulty.poles import Poles
from mechun.difficulty.settings import Settings
from mechun.errors import DataError

FORMAT = "mechun anchors 1"


def write_anchors(anchors: Anchors, path: Path) -> Path:
    """Write the anchors; the file depends on nothing but them."""
    from safetensors.torch import save_file

    poles, fit, calibration = anchors.lessons.poles, anchors.lessons.edge_fit, anchors.calibration
    tensors = {
        "easy": poles.easy,
        "hard": poles.hard,
        "kept": poles.kept,
        "direction": fit.direction,
        "centre": fit.centre,
        "hardness": anchors.hardness,
        "weights": calibration.weights,
        **{f"reference.{key}": values for key, values in calibration.references.items()},
    }
    # one key only: safetensors writes several in no fixed order, and equal anchors should give equal files
    header = {FORMAT: json.dumps(_describe(anchors), sort_keys=True)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata=header)
    return path


def read_anchors(path: Path) -> Anchors:
    """Read what `write_anchors` wrote.

    Raises:
        DataError: The file is missing or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as fault:
        raise DataError(f"{path} cannot be read as anchors: {fault}") from fault
    if FORMAT not in header:
        raise DataError(f"{path} holds no anchors", "give a file that a scoring run wrote")
    return _restore(json.loads(header[FORMAT]), tensors)


def _describe(anchors: Anchors) -> dict[str, Any]:
    poles, calibration = anchors.lessons.poles, anchors.calibration
    return {
        "graph": anchors.graph.to_dict(),
        "ids": anchors.ids,
        "entities": sorted(anchors.entities),
        "settings": anchors.settings.to_dict(),
        "model": anchors.model,
        "facts": anchors.facts,
        "reliability": anchors.reliability,
        "agreement": anchors.agreement,
        "notes": anchors.notes,
        "n_edges": poles.n_edges,
        "easy_ids": poles.easy_ids,
        "hard_ids": poles.hard_ids,
        "edge_penalty": anchors.lessons.edge_fit.penalty,
        "relations": dict(anchors.lessons.relations),
        "keys": calibration.keys,
        "intercept": calibration.intercept,
        "penalty": calibration.penalty,
        "inner": calibration.inner,
    }


def _restore(plain: dict[str, Any], tensors: dict[str, Tensor]) -> Anchors:
    kept: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in plain["settings"].items()}
    settings = Settings(**kept)
    ids = (tuple(plain["easy_ids"]), tuple(plain["hard_ids"]))
    poles = Poles(
        tensors["easy"], tensors["hard"], tensors["kept"].to(torch.bool), plain["n_edges"], *ids, settings.similarity
    )
    fit = EdgeFit(tensors["direction"], tensors["centre"], plain["edge_penalty"])
    keys = tuple(plain["keys"])
    references = {key: tensors[f"reference.{key}"] for key in keys}
    numbers = (plain["intercept"], plain["penalty"], plain["inner"])
    calibration = Calibration(keys, tensors["weights"], references, *numbers)
    return Anchors(
        Lessons(poles, fit, plain["relations"]),
        calibration,
        Graph.from_dict(plain["graph"]),
        tuple(plain["ids"]),
        frozenset(plain["entities"]),
        tensors["hardness"],
        settings,
        plain["model"],
        plain["facts"],
        plain["reliability"],
        plain["agreement"],
        tuple(plain["notes"]),
    )
