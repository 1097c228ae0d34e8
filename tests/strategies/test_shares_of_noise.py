"""Distributed differential privacy in rounds of four tiny clients: masked sums with a share of noise each."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from clients import parties as client_parties
from fedllm.adapters.parts import part_of
from fedllm.config.run_config import RunConfig
from fedllm.errors import BudgetSpentError
from fedllm.privacy.accounting import Charge
from fedllm.runs.checkpoint import ServerState
from strategies.rounds import next_round
from tests.strategies.conftest import NAMES, Run

Z, CLIP = 20.0, 0.01
SHARES = {
    "privacy.epsilon": 1e5,
    "privacy.unit": "client",
    "privacy.trust": "distributed",
    "privacy.noise-multiplier": Z,
    "privacy.clip": CLIP,
    "secure.method": "masks",
    "wire.codec": "fp32",
}


@pytest.fixture
def start(make_config: Callable[..., RunConfig], open_run: Callable[..., Run], tmp_path: Path) -> Callable:
    """Return a function (tamper, **flat) -> a run with state of its own."""

    def opened(tamper: Callable | None = None, **flat: Any) -> Run:
        return open_run(make_config({**SHARES, "run.output": str(tmp_path), **flat}), tamper=tamper)

    return opened


def without_answers(number: int, message_type: str = "train") -> Callable:
    """Return a tamper that loses the first so many replies of a type."""
    left = [number]

    def tamper(reply: Any) -> list[Any]:
        if reply.metadata.message_type == message_type and left[0]:
            left[0] -= 1
            reply.content = RecordDict()
        return [reply]

    return tamper


def moved(run: Run, state: ServerState) -> np.ndarray:
    """Return the change of B from the start of a run."""
    layout = run.session.layout
    change = state.adapter.vector - run.state.adapter.vector
    return np.asarray(part_of(layout, change, "b").double().numpy())


def client_entries(tmp_path: Path, name: str) -> list[Any]:
    (file,) = tmp_path.rglob(f"{name}/privacy-ledger.json")
    return list(json.loads(file.read_text()))


@pytest.mark.parametrize("lost", [0, 1])
def test_the_mean_has_the_noise_of_all_that_answered(start: Callable, lost: int) -> None:
    """Three answers of four, the fewest that are opened, have what a server would add; all have more."""
    # 7,168 values: enough to tell the noise of four shares from that of three.
    run = start(without_answers(lost), **{"lora.rank": 16, "lora.target-modules": "all-linear"})
    state, record = next_round(run.session, run.state)
    assert len(record.accepted) == 4 - lost
    answered = 4 - lost
    wanted = Z * CLIP * math.sqrt(answered / 3) / answered
    found = moved(run, state)
    assert abs(found.std() / wanted - 1) < 6 / math.sqrt(2 * len(found))
    assert abs(found.mean()) < 6 * wanted / math.sqrt(len(found))


def test_without_noise_the_mean_is_far_below(start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the figure above would be of clipped updates alone."""
    monkeypatch.setattr(
        client_parties, "noised_words", lambda values, noise, key: rounded(values, noise.step)
    )
    run = start()
    state, _ = next_round(run.session, run.state)
    assert 0 < float(np.linalg.norm(moved(run, state))) <= CLIP * 1.01


def rounded(values: np.ndarray, step: float) -> np.ndarray:
    return np.rint(values / step).astype(np.int64).astype(np.uint32)


def test_a_share_is_charged_as_noise_of_a_server(start: Callable, tmp_path: Path) -> None:
    run = start()
    state, spent = run.state, 0.0
    for _ in range(2):
        state, record = next_round(run.session, state)
        assert record.privacy.epsilon > spent
        assert record.privacy.noise_multiplier == Z
        spent = record.privacy.epsilon
        assert not record.training.losses
    assert state.ledger.accounts == dict.fromkeys(NAMES, (Charge(Z, 1.0, 2),))
    for name in NAMES:
        entries = client_entries(tmp_path, name)
        assert [entry["charges"][name]["noise_multiplier"] for entry in entries] == [Z, Z]


def test_a_sum_formed_again_is_charged_again_with_other_noise(start: Callable, tmp_path: Path) -> None:
    """Two lost answers leave too few to open; the next attempt is another sum of the same updates."""
    words: list[np.ndarray] = []
    noised = client_parties.noised_words

    def kept(*arguments: Any) -> np.ndarray:
        words.append(noised(*arguments))
        return words[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_parties, "noised_words", kept)
        run = start(without_answers(2))
        state, record = next_round(run.session, run.state)
    assert record.attempt == 2
    assert state.ledger.accounts == dict.fromkeys(NAMES, (Charge(Z, 1.0, 2),))
    assert [len(client_entries(tmp_path, name)) for name in NAMES] == [2, 2, 2, 2]
    first, again = (np.array(part).view(np.int32).astype(float) for part in (words[:4], words[4:]))
    size = first.shape[1]
    for one in first:
        assert max(abs(np.corrcoef(one, other)[0, 1]) for other in again) < 6 / math.sqrt(size)


def test_a_spent_budget_keeps_shares_back(start: Callable, tmp_path: Path) -> None:
    """The budget is that of two participations; the third finds no client that may answer."""
    run = start(
        **{"privacy.noise-multiplier": "auto", "federation.num-rounds": 2, "federation.max-retries": 0}
    )
    state, _ = next_round(run.session, run.state)
    state, _ = next_round(run.session, state)
    assert [len(client_entries(tmp_path, name)) for name in NAMES] == [2, 2, 2, 2]
    with pytest.raises(BudgetSpentError):
        next_round(run.session, state)
