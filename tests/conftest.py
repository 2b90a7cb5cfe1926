"""What holds for every test: no network, no telemetry, two threads at most, slow tests only when asked for."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

MARKS = {"slow": "--runslow", "peers": "--runpeers"}


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark, option in MARKS.items():
        parser.addoption(option, action="store_true", help=f"run the tests marked {mark}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark, option in MARKS.items():
            if mark in item.keywords and not config.getoption(option):
                item.add_marker(pytest.mark.skip(reason=f"asks for {option}"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def numerical_state():
    """Each test starts from the same global seed and must leave gradients enabled and the default dtype alone."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "the test left gradients disabled"
    assert torch.get_default_dtype() is torch.float32, "the test changed the default dtype"
