"""Benchmarks' random models made small enough for tests."""

import pytest

from scripts.benchmarks.models import SHAPES, TINY


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
