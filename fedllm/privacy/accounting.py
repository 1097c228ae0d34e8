"""How much a series of noised releases gives away: epsilon for noise, and noise for epsilon.

A release is a Gaussian one of noise multiplier z = deviation / sensitivity. Releases of everybody compose to
one Gaussian of mu = sqrt(sum 1 / z^2), whose epsilon solves an equation exactly (Balle & Wang 2018, arXiv
1805.06530; Dong, Roth & Su 2019, arXiv 1905.02383). Where each took part by its own coin of probability q,
privacy loss distributions give it to four digits (PLD: Koskela et al. 2019; Doroshenko et al. 2022, with
Google's dp-accounting, pessimistic estimate). Renyi accounting is kept as an independent check: it must not
be below. The neighbouring data lack one unit (add-or-remove-one).
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fedllm.errors import ConfigError, MissingExtraError

_RATE_STEP = 1.05  # rates are rounded up to powers of it, so that few differ
_LARGEST_NOISE = 1e6
_WHOLE_ORDERS = (*range(2, 64), 128, 256, 512)  # Renyi orders that are quick to compute


@dataclass(frozen=True)
class Charge:
    """`count` releases of one noise multiplier; in each a unit took part with probability `rate`.

    Rate 1 claims nothing of sampling: the unit took part.
    """

    noise_multiplier: float
    rate: float
    count: int

    def __post_init__(self) -> None:
        if not (self.noise_multiplier > 0 and 0 < self.rate <= 1 and self.count >= 0):
            raise ConfigError("a privacy charge needs noise above 0, a rate in (0, 1] and a count from 0")


def merged(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    """Return charges with those of the same noise and rate as one, in a fixed order."""
    counts: dict[tuple[float, float], int] = {}
    for charge in charges:
        place = (charge.noise_multiplier, charge.rate)
        counts[place] = counts.get(place, 0) + charge.count
    return tuple(Charge(*place, count) for place, count in sorted(counts.items()) if count)


def epsilon_of(charges: Iterable[Charge], delta: float) -> float:
    """Return the epsilon that the charges amount to at `delta`: the reported figure.

    Raises:
        MissingExtraError: a charge is sampled, and dp-accounting is not installed.
    """
    return _epsilon(merged(charges), delta)


@lru_cache(maxsize=4096)
def _epsilon(charges: tuple[Charge, ...], delta: float) -> float:
    if not charges:
        return 0.0
    if all(charge.rate == 1 for charge in charges):
        return gaussian_epsilon(math.sqrt(sum(c.count / c.noise_multiplier**2 for c in charges)), delta)
    library = _library()
    # Steps of the discretised loss: rounded up, so a coarser one only reports more. With little noise losses
    # are large and the finer steps would take ten times as long, for 0.002 % of epsilon.
    interval = 1e-3 if all(charge.noise_multiplier <= 2 for charge in charges) else 1e-4
    accountant = library.pld.PLDAccountant(
        library.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
    )
    return float(_composed(accountant, charges).get_epsilon(delta))


def renyi_epsilon(charges: Iterable[Charge], delta: float) -> float:
    """Return the epsilon of Renyi accounting (Mironov 2017): the check, some 10 to 20 % above the truth.

    Raises:
        MissingExtraError: dp-accounting is not installed.
    """
    return _renyi(merged(charges), delta)


def quick_bound(charges: Iterable[Charge], delta: float) -> float:
    """Return a bound of `epsilon_of` from above that is quick to compute.

    Raises:
        MissingExtraError: a charge is sampled, and dp-accounting is not installed.
    """
    charges = merged(charges)
    if all(charge.rate == 1 for charge in charges):
        return _epsilon(charges, delta)
    return _renyi(charges, delta, _WHOLE_ORDERS)


def renyi_check(charges: Iterable[Charge], delta: float) -> float | None:
    """Return `renyi_epsilon`, or None where dp-accounting is not installed."""
    try:
        return renyi_epsilon(charges, delta)
    except MissingExtraError:
        return None


@lru_cache(maxsize=4096)
def _renyi(charges: tuple[Charge, ...], delta: float, orders: Sequence[int] | None = None) -> float:
    if not charges:
        return 0.0
    library = _library()
    accountant = library.rdp.RdpAccountant(
        orders, neighboring_relation=library.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    with _quiet_absl():  # fractional orders that do not converge are left out, which only loosens the bound
        return float(_composed(accountant, charges).get_epsilon(delta))


@contextmanager
def _quiet_absl() -> Iterator[None]:
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of one Gaussian release of sensitivity mu and deviation 1, exactly.

    It solves Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu) = delta, rounded up.
    """
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    return _bisected(lambda epsilon: gaussian_delta(mu, epsilon) <= delta, low=0.0, high=1.0)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the delta of one Gaussian release of sensitivity mu and deviation 1 at `epsilon`."""
    second = _normal_cdf(-mu / 2 - epsilon / mu)
    weighted = math.exp(epsilon + math.log(second)) if second > 0 else 0.0
    return max(0.0, _normal_cdf(mu / 2 - epsilon / mu) - weighted)


def _normal_cdf(x: float) -> float:
    """Return Phi(x), exact far out too: `statistics` takes 1 + erf there, which cancels."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _bisected(holds: Callable[[float], bool], *, low: float, high: float) -> float:
    """Return the least value, to 1e-9 of itself and from above, at which a growing condition holds."""
    while not holds(high):
        low, high = high, 2 * high
        if high > 1e12:
            return math.inf
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@lru_cache(maxsize=1024)
def noise_for(epsilon: float, delta: float, *, rate: float, count: int) -> float:
    """Return the least noise multiplier, to 0.1 % and from above, that keeps `count` releases within budget.

    Raises:
        ConfigError: no noise does.
        MissingExtraError: the releases are sampled, and dp-accounting is not installed.
    """
    one = Charge(1.0, rate, count)
    if rate == 1:
        mu = 1 / _bisected(lambda x: gaussian_epsilon(1 / x, delta) <= epsilon, low=1e-6, high=1.0)
        return math.sqrt(count) / mu

    def renyi_holds(noise: float) -> bool:
        return _renyi((replace(one, noise_multiplier=noise),), delta, _WHOLE_ORDERS) <= epsilon

    high = 1.0  # Renyi accounting is quick and an upper bound: it brackets the answer from above
    while not renyi_holds(high):
        high *= 2
        if high > _LARGEST_NOISE:
            raise ConfigError(f"privacy.epsilon = {epsilon:g}: no noise keeps {count} releases within it")
    low = high / 2
    while renyi_holds(low) and low > 1e-2:
        low, high = low / 2, low
    while high - low > 1e-2 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if renyi_holds(middle) else (middle, high)
    return _tightened(one, epsilon, delta, high)


def _tightened(one: Charge, epsilon: float, delta: float, high: float) -> float:
    """Return the least noise by privacy loss distributions, from one that suffices on (secant in logs)."""

    def spent(noise: float) -> float:
        return epsilon_of([replace(one, noise_multiplier=noise)], delta)

    low, high_spent = 0.85 * high, spent(high)
    low_spent = spent(low)
    for _ in range(12):
        if low_spent <= epsilon:
            low, high, high_spent = 0.85 * low, low, low_spent
            low_spent = spent(low)
            continue
        if high - low <= 1e-3 * high or high_spent >= epsilon * (1 - 1e-3):
            break
        slope = (math.log(epsilon * (1 - 4e-4)) - math.log(high_spent)) / (
            math.log(low_spent) - math.log(high_spent)
        )
        middle = high * (low / high) ** slope
        middle_spent = spent(middle)
        if middle_spent <= epsilon:
            high, high_spent = middle, middle_spent
        else:
            low, low_spent = middle, middle_spent
    return high


def rate_bound(rate: float) -> float:
    """Return a rate at or just above `rate`, of few possible ones: a larger rate only charges more."""
    if rate >= 1:
        return 1.0
    return float(min(1.0, _RATE_STEP ** math.ceil(math.log(rate) / math.log(_RATE_STEP))))


def accountant_name(charges: Iterable[Charge]) -> str:
    """Return what the reported figure of these charges comes from, with its version."""
    if all(charge.rate == 1 for charge in charges):
        return "exact Gaussian (Balle & Wang 2018)"
    try:
        return f"privacy loss distributions, dp-accounting {version('dp-accounting')}"
    except PackageNotFoundError:
        return "privacy loss distributions, dp-accounting"


def check_installed() -> None:
    """Find out before a run whether sampled releases can be counted.

    Raises:
        MissingExtraError: dp-accounting is not installed.
    """
    _library()


def _composed(accountant: Any, charges: tuple[Charge, ...]) -> Any:
    library = _library()
    for charge in charges:
        event = library.GaussianDpEvent(charge.noise_multiplier)
        if charge.rate < 1:
            event = library.PoissonSampledDpEvent(charge.rate, event)
        accountant.compose(event, charge.count)
    return accountant


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError:
        raise MissingExtraError(
            "differential privacy with sampling needs dp-accounting: pip install 'fedllm[dp]'"
        ) from None
    return dp_accounting
