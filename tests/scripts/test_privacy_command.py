"""The plan of a private run: how long the noise on the whole change is, by numbers worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.plan.privacy import PrivacyPlan
from fedllm.plan.run_plan import resolve
from scripts.commands.privacy_command import full_rounds, privacy, signal_to_noise

NUM_VALUES = 10_000  # noise of deviation 1 on each is 100 long
Z = 2.0


def ratio(**fields: object) -> float:
    flat = {
        "privacy.epsilon": 8.0,
        "federation.num-clients": 1000,
        "federation.cohort": 100,
        "federation.num-rounds": 25,
        "train.local-steps": 4,
        "train.batch-size": 8,
        **fields,
    }
    config = RunConfig.from_flat(flat)
    plan = resolve(config).privacy
    assert isinstance(plan, PrivacyPlan)
    return signal_to_noise(plan, Z, full_rounds(config, plan), NUM_VALUES)


@pytest.mark.parametrize("selection", ["uniform", "poisson"])
def test_noised_sum_has_noise_in_every_round(selection: str) -> None:
    # 25 rounds of 100 clips: 2,500. Noise: sqrt(25) rounds of 2 clips on 10,000 values: 5 * 2 * 100 = 1,000.
    found = ratio(**{"privacy.unit": "client", "federation.selection": selection})
    assert found == pytest.approx(2.5)


def test_noise_of_every_client_is_averaged_over_the_cohort() -> None:
    # A mean moves by 1 clip a round: 25. Noise of a mean of 100: 2 * 100 / sqrt(100) = 20, sqrt(25) times.
    found = ratio(**{"privacy.unit": "client", "privacy.trust": "local"})
    assert found == pytest.approx(25 / 100)


def test_noise_of_a_step_is_shared_by_its_rows_and_the_cohort() -> None:
    # 25 * 4 steps of 1 clip: 100. Noise of a step: 2 * 100 / 8 rows / sqrt(100) = 2.5, sqrt(100) times.
    assert ratio() == pytest.approx(100 / 25)


@pytest.mark.parametrize(
    ("most", "rounds"),
    [(1, 10), (2, 20), (3, 25)],  # 1,000 clients, 100 a round: each has had its turn after 10
)
def test_limit_of_participations_spares_no_round_its_noise(most: int, rounds: int) -> None:
    found = ratio(**{"privacy.unit": "client", "privacy.max-participations": most})
    assert found == pytest.approx(rounds * 100 / (rounds**0.5 * Z * 100))


@pytest.mark.parametrize(
    ("noise", "epsilon", "budget"),
    [
        (4.0, "epsilon 4.98 at", "privacy.epsilon = 8, is enough"),
        (1.0, "epsilon 28.4 at", "privacy.epsilon = 8, ends the run before"),
        (0.0, "epsilon 8 at", ""),
    ],
)
def test_a_given_noise_is_answered_by_its_own_epsilon(
    noise: float,
    epsilon: str,
    budget: str,
    make_model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (f"model.name={make_model_folder()}", "privacy.unit=client", "distill.when=never")
    words += ("federation.num-rounds=20",)
    privacy(words, noise=noise, rows=100, as_json=False)
    printed = capsys.readouterr().out
    assert printed.startswith(epsilon)
    assert budget in printed
    assert ("privacy.epsilon = 8," in printed) == bool(budget)
