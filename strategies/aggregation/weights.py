"""What an update counts before any rule sees it."""


def staleness_weight(staleness: int, exponent: float = 0.5) -> float:
    """Return the factor (1 + s)^-exponent of an update that is `staleness` rounds late.

    The polynomial form of FedAsync (arXiv 1903.03934); FedBuff (arXiv 2106.06639) takes exponent 1/2, and
    exponent 0 counts a late update in full. `combine.add` takes a weight that is already discounted.

    Raises:
        ValueError: `staleness` or `exponent` is negative.
    """
    if staleness < 0 or exponent < 0:
        raise ValueError(f"staleness {staleness} and exponent {exponent} may not be negative")
    return float((1 + staleness) ** -exponent)
