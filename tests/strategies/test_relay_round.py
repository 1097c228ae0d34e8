"""Sums that the server only passes on: parties have the adapter that it would have, and it has none."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm.config.run_config import RunConfig
from fedllm.plan import secure
from strategies.rounds import next_round
from tests.strategies.conftest import NAMES, Run

SHARES = {"secure.method": "shares", "federation.min-clients": 3}


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure, "BUILT", frozenset({"masks", "he", "shares"}))


def test_try(make_config: Callable[..., RunConfig], open_run: Callable[..., Run]) -> None:
    run = open_run(make_config(SHARES))
    state, record = next_round(run.session, run.state)
    print(run.notices, record)
    state, record = next_round(run.session, state)
    print(run.notices, record)
    assert 0
