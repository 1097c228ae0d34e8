"""Verification: what forgets nothing is told from retraining, and a measure without power says nothing."""

from collections.abc import Callable, Collection
from dataclasses import replace

import pytest

from clients.canaries import canary_file
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.attacks.canaries import canary_rows
from fedllm.config.run_config import RunConfig
from fedllm.distillation.student import StudentTraining, supervised
from fedllm.errors import ConfigError
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import run_folder
from fedllm.runs.records import RoundRecord
from fedllm.runs.unlearning import LIKE, UNKNOWN, UNLIKE
from scripts.unlearning.approximate import Case
from scripts.unlearning.left import EXPOSURE, planted
from scripts.unlearning.verify import Verdict, holder_of, verify, welch

HIGH, LOW, NEAR = (3.9, 4.1, 4.0), (0.9, 1.1, 1.0), (1.0, 1.2, 0.9)


@pytest.mark.parametrize(
    ("with_client", "unlearnt", "said"),
    [(HIGH, NEAR, LIKE), (HIGH, HIGH, UNLIKE), (LOW, NEAR, UNKNOWN), (LOW, HIGH, UNLIKE)],
)
def test_a_verdict_needs_a_measure_that_can_tell(with_client: tuple, unlearnt: tuple, said: str) -> None:
    assert Verdict(with_client=with_client, retrained=LOW, unlearnt=unlearnt).in_words == said


def test_equal_and_constant_samples_have_p_values() -> None:
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert welch([1.0, 1.0], [2.0, 2.0]) == 0.0
    assert 0 < welch(HIGH, LOW) < 0.001


def test_fewer_than_three_seeds_verify_nothing(make_config: Callable) -> None:
    with pytest.raises(ConfigError, match="at least 3 seeds"):
        verify(make_config(), "ben", "ascent", [0, 1, 1])


def test_what_forgets_nothing_is_told_from_what_never_knew(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(("anna", "ben"), {"audit.canaries": 32})
    for seed in range(3):  # known secrets: a test that tosses coins fails now and then
        secret = canary_file(run_folder(config).parent / f"seed-{seed}" / "private", f"seed-{seed}")
        secret.parent.mkdir(parents=True)
        secret.write_bytes(bytes(range(seed, seed + 32)))

    def trained(config: RunConfig, without: Collection[str] = ()) -> tuple[ServerState, ...]:
        """Return the state after a run in which ben alone has trained, on its canaries by heart."""
        holder = holder_of(config)
        adapter = initial_adapter(holder.engine.layout, config.seed)
        if not without:
            rows = canary_rows(planted(holder, "ben"))
            by_heart = StudentTraining(steps=50, batch_size=4, learning_rate=0.02, seed=0)
            adapter = supervised(holder.engine, adapter, rows, by_heart).adapter
        return (ServerState(1, adapter, records=(RoundRecord(round_num=1, accepted=("ben",)),)),)

    def forgets_nothing(case: Case, method: str) -> AdapterState:
        return case.final.adapter

    monkeypatch.setattr("scripts.unlearning.verify.states_of", trained)
    monkeypatch.setattr("scripts.unlearning.verify.forget", forgets_nothing)
    found = verify(config, "ben", "ascent", [0, 1, 2])[EXPOSURE]
    assert found.in_words == UNLIKE, found.to_dict()
    assert replace(found, unlearnt=found.retrained).in_words == LIKE
