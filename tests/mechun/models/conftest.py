"""Checkpoint folders of every family, saved once per session, and a model loaded from one of them."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from mechun.models import LoadedModel, load_model
from tests.toys import build_hf, make_tokenizer


def save_family(folder: Path, family: str) -> Path:
    build_hf(family).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family; read it, do not change it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: save_family(root / family, family))


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """A family's model, loaded and checked once; leave it as it was."""
    return functools.cache(lambda family: load_model(checkpoint(family)))
