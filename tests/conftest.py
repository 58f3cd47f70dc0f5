"""Markers, seeds and options shared by every test. Collection touches no GPU."""

from __future__ import annotations

import random

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-facts", action="store_true", help="rewrite tests/compile/facts.json with what the compiler made just now")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("sm90")]
    if not marked:
        return
    available = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if available else (0, 0)
    for item in marked:
        if capability < (8, 0):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device of compute capability 8.0 or newer"))
        elif item.get_closest_marker("sm90") and capability != (9, 0):
            item.add_marker(pytest.mark.skip(reason=f"needs a Hopper device, this one is {capability[0]}.{capability[1]}"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
