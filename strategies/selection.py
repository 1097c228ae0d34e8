"""Which clients a round asks: a seeded uniform draw without replacement."""

import math
import random
from collections.abc import Iterable

from fedllm.seeds import derive_seed


def choose_clients(
    available: Iterable[str],
    *,
    cohort_size: int,
    over_selection: float,
    seed: int,
    round_num: int,
    attempt: int,
) -> tuple[str, ...]:
    """Return the clients to ask, sorted: the cohort and its over-selection (Bonawitz et al. 2019, 130 %).

    The same seed, round, attempt and available clients give the same answer in every runtime.
    """
    clients = sorted(available)
    number = min(len(clients), math.ceil(cohort_size * over_selection))
    generator = random.Random(derive_seed(seed, "cohort", round_num, attempt))
    return tuple(sorted(generator.sample(clients, number)))
