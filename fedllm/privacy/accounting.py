"""Privacy accounting: the epsilon of a series of noised releases, and the noise for an epsilon.

Every release adds Gaussian noise of multiplier z = deviation / sensitivity. Neighbouring data differ by one
unit: it takes part or counts as nothing. Where the number of units is hidden that is add-or-remove-one, where
it is public zero-out, and the figures of both are the same. Two cases:

- every unit takes part in every release: together they are one Gaussian release with mu = sqrt(sum 1 / z^2),
  and its epsilon solves an exact equation (Balle & Wang 2018, arXiv 1805.06530; Dong, Roth & Su 2019, arXiv
  1905.02383);
- each unit takes part by a coin of probability q: privacy loss distributions give epsilon to four digits
  (Koskela et al. 2019; Doroshenko et al. 2022; Google's dp-accounting, pessimistic estimate). Renyi
  accounting is an independent check, which must not come out lower.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
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
    """Return the charges in a fixed order, those of the same noise and rate added up."""
    counts: dict[tuple[float, float], int] = {}
    for charge in charges:
        place = (charge.noise_multiplier, charge.rate)
        counts[place] = counts.get(place, 0) + charge.count
    return tuple(Charge(*place, count) for place, count in sorted(counts.items()) if count)


def epsilon_of(charges: Iterable[Charge], delta: float) -> float:
    """Return the epsilon of all charges together at `delta`: the figure that a run reports.

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
    # Losses are rounded up to multiples of the interval, so a coarser one only reports more. Little noise
    # means large losses: there the finer interval takes ten times as long, for 0.002 % of epsilon.
    interval = 1e-3 if all(charge.noise_multiplier <= 2 for charge in charges) else 1e-4
    accountant = library.pld.PLDAccountant(
        library.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
    )
    return float(_composed(accountant, charges).get_epsilon(delta))


def renyi_epsilon(charges: Iterable[Charge], delta: float) -> float:
    """Return the epsilon of Renyi accounting (Mironov 2017), some 10 to 20 % above `epsilon_of`: the check.

    Raises:
        MissingExtraError: dp-accounting is not installed.
    """
    return _renyi(merged(charges), delta)


def quick_bound(charges: Iterable[Charge], delta: float) -> float:
    """Return an upper bound of `epsilon_of` that is quick to compute.

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
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:  # it warns of fractional orders that do not converge; without them the bound is only looser
        return float(_composed(accountant, charges).get_epsilon(delta))
    finally:
        logger.disabled = before


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of one Gaussian release of sensitivity mu and deviation 1, exactly.

    It solves Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu) = delta, rounded up.
    """
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    return _least_that_holds(lambda epsilon: gaussian_delta(mu, epsilon) <= delta, low=0.0)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the delta of one Gaussian release of sensitivity mu and deviation 1 at `epsilon`."""
    second = _normal_cdf(-mu / 2 - epsilon / mu)
    weighted = math.exp(epsilon + math.log(second)) if second > 0 else 0.0  # exp(epsilon) alone overflows
    return max(0.0, _normal_cdf(mu / 2 - epsilon / mu) - weighted)


def _normal_cdf(x: float) -> float:
    """Return Phi(x), exact far out too: `statistics` takes 1 + erf there, which cancels."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _least_that_holds(
    holds: Callable[[float], bool], *, low: float, most: float = 1e12, precision: float = 1e-9
) -> float:
    """Return the least value at which a growing condition holds, infinity where it is above `most`.

    The answer is searched from 1 on, up by doubling and down to `low` or 0.01, and then halved to `precision`
    of itself. Not brentq: the condition must hold at the value returned, since it is a claim of privacy, and
    noise calibrated with other steps would differ in its last bits, so that no private run could be repeated.
    """
    high = 1.0
    while not holds(high):
        low, high = high, 2 * high
        if high > most:
            return math.inf
    while low > 1e-2 and holds(low):
        low, high = low / 2, low
    while high - low > precision * high:
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
        mu = 1 / _least_that_holds(lambda x: gaussian_epsilon(1 / x, delta) <= epsilon, low=1e-6)
        return math.sqrt(count) / mu
    # Renyi accounting is quick and an upper bound, so the noise that it asks for is enough.
    enough = _least_that_holds(
        lambda noise: _renyi((replace(one, noise_multiplier=noise),), delta, _WHOLE_ORDERS) <= epsilon,
        low=0.5,
        most=_LARGEST_NOISE,
        precision=1e-2,
    )
    if math.isinf(enough):
        raise ConfigError(f"privacy.epsilon = {epsilon:g}: no noise keeps {count} releases within it")
    return _tightened(one, epsilon, delta, enough)


def _tightened(one: Charge, epsilon: float, delta: float, high: float) -> float:
    """Return the least noise by privacy loss distributions, starting at `high`, which is enough.

    Each of these takes a tenth of a second or more, so the steps are secants in logarithms: log epsilon is
    nearly linear in log noise.
    """

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
        # Aimed just below the budget, so that the secant's error seldom lands above it.
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
    """Return a rate up to 5 % above `rate`, rounded so that accounts share few; a larger one charges more."""
    if rate >= 1:
        return 1.0
    return float(min(1.0, _RATE_STEP ** math.ceil(math.log(rate) / math.log(_RATE_STEP))))


def accountant_name(charges: Iterable[Charge]) -> str:
    """Return the name and version of the method that `epsilon_of` uses for these charges."""
    if all(charge.rate == 1 for charge in charges):
        return "exact Gaussian (Balle & Wang 2018)"
    try:
        return f"privacy loss distributions, dp-accounting {version('dp-accounting')}"
    except PackageNotFoundError:
        return "privacy loss distributions, dp-accounting"


def check_installed() -> None:
    """Check before a run that sampled releases can be accounted.

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
