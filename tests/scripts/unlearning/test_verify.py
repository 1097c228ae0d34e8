"""Verification: what forgets nothing is told from retraining, and a measure without power says nothing."""

from collections.abc import Callable

import pytest

from clients.canaries import canary_file
from fedllm.errors import ConfigError
from fedllm.runs.folder import run_folder
from fedllm.runs.unlearning import LIKE, UNKNOWN, UNLIKE
from scripts.unlearning.approximate import Case
from scripts.unlearning.left import EXPOSURE
from scripts.unlearning.verify import Verdict, verify, welch

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


def test_a_method_that_forgets_nothing_is_unlike_retraining(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def does_nothing(case: Case, method: str) -> object:
        return case.final.adapter

    monkeypatch.setattr("scripts.unlearning.verify.forget", does_nothing)
    by_heart = {"train.local-steps": 12, "train.batch-size": 8, "audit.canaries": "16:16"}
    config = make_config(("anna", "ben"), {**by_heart, "train.learning-rate": 0.05})
    for seed in range(3):  # known secrets: a test that tosses coins fails now and then
        secret = canary_file(run_folder(config).parent / f"seed-{seed}" / "private", f"seed-{seed}")
        secret.parent.mkdir(parents=True)
        secret.write_bytes(bytes(range(seed, seed + 32)))
    found = verify(config, "ben", "ascent", [0, 1, 2])[EXPOSURE]
    assert found.in_words == UNLIKE
    assert found.to_dict()["unlearnt"] > found.to_dict()["retrained"]
