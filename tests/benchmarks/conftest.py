"""Benchmarks' random models made small enough for tests."""

from pathlib import Path

import pytest

from scripts.benchmarks.models import SHAPES, TINY

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker("research")


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setitem(SHAPES, TINY, shape)
