"""Confidence bounds of a share that was counted: how far a rate of few trials can be trusted."""

from scipy.special import betaincinv


def clopper_pearson(count: int, number: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided interval of a share where `count` of `number` were seen.

    The bounds are quantiles of beta distributions (Clopper and Pearson, Biometrika 26, 1934). Without a trial
    the interval is (0, 1).

    Raises:
        ValueError: more were seen than tried, or the confidence is not between 0 and 1.
    """
    if not 0 <= count <= number or not 0 < confidence < 1:
        raise ValueError(f"{count} of {number} at confidence {confidence}")
    miss = (1 - confidence) / 2
    # At 0 and at 1 there is no quantile: nothing is below, nothing above.
    lower = float(betaincinv(count, number - count + 1, miss)) if count else 0.0
    upper = float(betaincinv(count + 1, number - count, 1 - miss)) if count < number else 1.0
    return lower, upper
