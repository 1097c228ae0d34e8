"""Charts of clients' losses: false alarms at the stated rate, real rises found, histories that go on."""

import numpy as np
import pytest

from fedllm.monitoring.drift import Chart, DriftRule, add_losses


def alarms_of(losses: np.ndarray, rule: DriftRule) -> list[tuple[int, str]]:
    """Return (round, client) of every alarm of losses [rounds, clients]."""
    charts: dict[str, Chart] = {}
    found = []
    for number, row in enumerate(losses):
        charts, drifted = add_losses(charts, {str(i): float(loss) for i, loss in enumerate(row)}, rule)
        found += [(number, client) for client in drifted]
    return found


@pytest.mark.parametrize("num_clients", [1, 3])
def test_stationary_losses_give_the_stated_false_alarms(num_clients: int) -> None:
    generator = np.random.default_rng(num_clients)
    means, deviations = generator.uniform(1, 5, num_clients), generator.uniform(0.01, 0.5, num_clients)
    rule, rounds = DriftRule(rounds=100, least=0.0), 6000
    found = alarms_of(generator.normal(means, deviations, (rounds, num_clients)), rule)
    # 60 are expected, and alarms of a chart that starts anew are nearly independent: 3 Poisson deviations.
    assert 37 <= len(found) <= 83, len(found)


def test_a_rise_that_counts_as_less_gives_no_more_alarms() -> None:
    losses = np.random.default_rng(3).normal(3.0, 0.05, (2000, 1))
    numbers = [len(alarms_of(losses, DriftRule(rounds=50, least=least))) for least in (0.0, 0.05, 0.2)]
    assert numbers[0] >= numbers[1] >= numbers[2] == 0
    assert numbers[0] > 20


def test_a_rise_of_two_deviations_is_found_within_ten_rounds() -> None:
    generator = np.random.default_rng(5)
    losses = generator.normal(3.0, 0.1, (160, 40))
    losses[100:] += 0.2  # of all clients, at round 100
    found = alarms_of(losses, DriftRule(rounds=1000, least=0.01))
    first = {client: number for number, client in reversed(found)}
    assert min(first.values()) >= 100
    assert sum(number < 110 for number in first.values()) >= 36, "of 40 clients"


def test_a_rate_that_no_bound_is_low_enough_for_has_the_lowest() -> None:
    assert DriftRule(rounds=2).bound(0) == DriftRule(rounds=1.5).bound(1) == 0.0
    assert 0.0 < DriftRule(rounds=3).bound(1) < DriftRule(rounds=1e9).bound(1000)


def test_a_fall_gives_no_alarm() -> None:
    losses = np.random.default_rng(6).normal(3.0, 0.05, (200, 3)) - np.linspace(0, 2, 200)[:, None]
    assert alarms_of(losses, DriftRule(rounds=50)) == []


def test_a_step_after_a_history_without_spread_is_found_at_once() -> None:
    losses = np.full((6, 2), 3.0)
    losses[5, 1] += 0.5
    assert alarms_of(losses, DriftRule()) == [(5, "1")]
    losses[5, 1] = 3.02  # one deviation as `least` counts
    assert alarms_of(losses, DriftRule()) == []


def test_a_moved_history_expects_the_gain_of_the_new_adapter() -> None:
    charts, _ = add_losses({}, {"a": 3.0}, DriftRule())
    for _ in range(4):
        charts, _ = add_losses(charts, {"a": 3.0}, DriftRule())
    moved = {"a": charts["a"].moved(-0.6)}
    assert add_losses(moved, {"a": 2.4}, DriftRule())[1] == ()
    assert add_losses(moved, {"a": 3.0}, DriftRule())[1] == ("a",), "the gain is not there"


def test_a_client_that_drifted_begins_a_new_history() -> None:
    losses = np.full((12, 1), 3.0)
    losses[5:] = 3.8
    assert alarms_of(losses, DriftRule()) == [(5, "0")], "the new level is its own from then on"
