"""Epsilon against numbers that others have published or computed in other ways."""

import math
import sys
from statistics import NormalDist

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedllm.errors import ConfigError, MissingExtraError
from fedllm.privacy.accounting import (
    Charge,
    check_installed,
    epsilon_of,
    gaussian_delta,
    gaussian_epsilon,
    merged,
    noise_for,
    rate_bound,
    renyi_epsilon,
)

laws = settings(deadline=None, max_examples=30)


def library() -> None:
    pytest.importorskip("dp_accounting", reason="the extra dp is not installed")


def test_full_participation_is_one_gaussian() -> None:
    assert epsilon_of([Charge(4.0, 1.0, 20)], 1e-3) == pytest.approx(3.6051, abs=1e-4)
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3772, abs=1e-4)


def test_the_exact_gaussian_agrees_with_loss_distributions() -> None:
    library()
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(4.0), 20)
    assert accountant.get_epsilon(1e-3) == pytest.approx(epsilon_of([Charge(4.0, 1.0, 20)], 1e-3), rel=1e-4)


def test_the_case_that_opacus_pins() -> None:
    library()
    case = [Charge(1.5, 0.04, 2250)]
    assert renyi_epsilon(case, 1e-5) == pytest.approx(7.32911, rel=1e-4)
    assert epsilon_of(case, 1e-5) == pytest.approx(6.777, rel=2e-3)  # their PRV figure of 2,249 steps


def test_a_row_that_counts_as_nothing_costs_what_one_left_out_does() -> None:
    """Zero-out, with a public number of rows, is dp-accounting's replacement by a special row."""
    library()
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=1e-3
    )
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0)), 40)
    assert accountant.get_epsilon(1e-5) == pytest.approx(epsilon_of([Charge(1.0, 0.05, 40)], 1e-5), rel=1e-9)


def test_fifty_of_a_thousand_clients() -> None:
    library()
    case = [Charge(1.0, 0.05, 100)]
    assert epsilon_of(case, 1e-5) == pytest.approx(3.50, abs=0.005)
    assert renyi_epsilon(case, 1e-5) == pytest.approx(4.04, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "noise", "count", "delta"),
    [(0.1, 1.0, 100, 1e-4), (0.01, 1.0, 1000, 1e-5), (0.25, 2.0, 50, 1e-3), (0.02, 0.8, 500, 1e-6)],
)
def test_renyi_accounting_is_above_and_at_most_a_fifth(
    rate: float, noise: float, count: int, delta: float
) -> None:
    library()
    case = [Charge(noise, rate, count)]
    exact = epsilon_of(case, delta)
    assert exact <= renyi_epsilon(case, delta) <= 1.2 * exact


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.04, 1.5, 2250), (0.05, 1.0, 100)])
def test_an_independent_accountant_agrees_to_half_a_percent(rate: float, noise: float, count: int) -> None:
    library()
    prv = pytest.importorskip("prv_accountant", reason="prv-accountant is not installed")
    mechanism = prv.PoissonSubsampledGaussianMechanism(sampling_probability=rate, noise_multiplier=noise)
    accountant = prv.PRVAccountant(
        prvs=[mechanism], max_self_compositions=[count], eps_error=0.01, delta_error=1e-10
    )
    lower, _, upper = accountant.compute_epsilon(delta=1e-5, num_self_compositions=[count])
    found = epsilon_of([Charge(noise, rate, count)], 1e-5)
    assert 0.995 * lower <= found <= 1.005 * upper


@laws
@example(mu=6.394730154648072, delta=0.1730232230608851)  # far out in the tail, where erf cancels
@given(mu=st.floats(0.01, 20), delta=st.floats(1e-9, 0.4))
def test_epsilon_of_a_gaussian_solves_its_equation_from_above(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, epsilon) <= delta
    if epsilon > 1e-6:
        assert gaussian_delta(mu, epsilon * (1 - 1e-6)) >= delta * (1 - 1e-6)
    normal = NormalDist()
    assert gaussian_delta(mu, 0.0) == pytest.approx(2 * normal.cdf(mu / 2) - 1)


@laws
@given(noise=st.floats(0.5, 20), count=st.integers(1, 200), delta=st.floats(1e-8, 1e-2))
def test_more_noise_fewer_releases_and_a_larger_delta_cost_less(
    noise: float, count: int, delta: float
) -> None:
    base = epsilon_of([Charge(noise, 1.0, count)], delta)
    assert epsilon_of([Charge(noise * 1.1, 1.0, count)], delta) <= base
    assert epsilon_of([Charge(noise, 1.0, count + 1)], delta) >= base
    assert epsilon_of([Charge(noise, 1.0, count)], delta * 2) <= base
    assert epsilon_of([Charge(noise, 1.0, count), Charge(noise, 1.0, 0)], delta) == base


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_calibrated_noise_is_the_least_within_the_budget(rate: float, epsilon: float) -> None:
    if rate < 1:
        library()
    noise = noise_for(epsilon, 1e-5, rate=rate, count=30)
    assert 0.995 * epsilon <= epsilon_of([Charge(noise, rate, 30)], 1e-5) <= epsilon


@laws
@given(rate=st.floats(1e-6, 1))
def test_rates_are_rounded_up_by_at_most_five_percent(rate: float) -> None:
    bound = rate_bound(rate)
    assert rate * (1 - 1e-12) <= bound <= min(1.0, rate * 1.05 * (1 + 1e-12))


def test_charges_of_equal_noise_add_up() -> None:
    charges = [Charge(1.0, 0.5, 2), Charge(2.0, 1.0, 1), Charge(1.0, 0.5, 3), Charge(3.0, 1.0, 0)]
    assert merged(charges) == (Charge(1.0, 0.5, 5), Charge(2.0, 1.0, 1))
    assert merged(reversed(charges)) == merged(charges)


def test_without_the_extra_one_line_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for ask in (check_installed, lambda: epsilon_of([Charge(1.25, 0.5, 1)], 1e-5)):
        with pytest.raises(MissingExtraError, match=r"pip install 'fedllm\[dp\]'") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert epsilon_of([Charge(1.25, 1.0, 1)], 1e-5) > 0  # nothing sampled, nothing needed


@pytest.mark.parametrize(
    "values", [(0.0, 1.0, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 1.0, -1), (math.nan, 1.0, 1)]
)
def test_a_charge_without_noise_is_none(values: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError):
        Charge(*values)
