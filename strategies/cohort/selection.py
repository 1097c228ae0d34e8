"""Which clients a round asks: five rules, each a function of what the server already holds.

A rule sees the clients that are free, the records of past rounds and a seeded stream of random numbers, and
nothing else: every runtime and a resumed run choose the same. Where the numbers come from decides what may be
claimed under differential privacy: only uniform and poisson draw without looking at any data, and
`fedllm.plan.refusals` refuses the others where a guarantee would be false.

uniform          without replacement, every client alike: those with the smallest keyed hash of round, attempt
                 and name. Without one of the clients only the rounds that asked it ask somebody else, so a
                 run can forget a client by doing these rounds again (`strategies/unlearning/`)
weighted         without replacement, each draw proportional to the declared rows. Weighting the updates by
                 their rows as well counts a row twice; `aggregation.weighting = "uniform"` does not
poisson          each client by its own coin, q = cohort / federation.num-clients; the round may be empty.
                 A draw below federation.min-clients is left out whole, which at 1 means: an empty one
power-of-choice  the worst known losses among candidates drawn like weighted (arXiv 2010.01243; a loss is the
                 one a client last reported, their variant rpow-d, so nothing is asked or sent for it)
oort             by statistical utility, speed and time since the last turn, and some unknown clients to
                 explore (Oort, arXiv 2010.06081, in a simple form)
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from fedllm.messages import JoinedClient
from fedllm.plan.cohort import CohortPlan
from fedllm.privacy.keys import derived_key
from fedllm.runs.records import RoundRecord
from fedllm.seeds import derive_seed

# Oort's own numbers: the share of unknown clients in a round, the first, its decay and the least; the weight
# of time since the last turn; the power of the penalty for being slow; the cut below the last chosen utility.
EXPLORATION, EXPLORATION_DECAY, LEAST_EXPLORATION = 0.9, 0.98, 0.2
UNCERTAINTY, SLOWNESS_POWER, CUT_OFF = 0.1, 2.0, 0.95


@dataclass(frozen=True, eq=False)
class _Draw:
    """One draw of at most `number` clients: what a rule may look at."""

    clients: Mapping[str, int]  # id -> declared rows, sorted by id
    number: int
    cohort: CohortPlan
    past: Sequence[RoundRecord]
    round_num: int
    generator: random.Random
    turn: Callable[[str], bytes]  # a client's hash in this round and attempt, 32 bytes


_Rule: TypeAlias = Callable[[_Draw], Iterable[str]]


def choose_clients(
    available: Iterable[JoinedClient],
    past: Sequence[RoundRecord],
    *,
    cohort: CohortPlan,
    seed: int,
    round_num: int,
    attempt: int,
) -> tuple[str, ...]:
    """Return the clients to ask, sorted; fewer than wanted where fewer are available.

    The same seed, round, attempt, available clients and past give the same answer in every runtime.
    """
    clients = {client.client_id: client.num_train for client in available}
    draw = _Draw(
        {client: clients[client] for client in sorted(clients)},
        min(len(clients), cohort.num_asked),
        cohort,
        past,
        round_num,
        random.Random(derive_seed(seed, "cohort", round_num, attempt)),
        partial(derived_key, str(seed).encode(), "cohort", round_num, attempt),
    )
    return tuple(sorted(RULES[cohort.rule](draw)))


def last_losses(past: Sequence[RoundRecord]) -> dict[str, float]:
    """Return the training loss every client reported last, in nats per token."""
    return {client: loss for record in past for client, loss in record.training.losses.items()}


def _uniform(draw: _Draw) -> list[str]:
    return sorted(draw.clients, key=draw.turn)[: draw.number]


def _poisson(draw: _Draw) -> list[str]:
    rate = draw.cohort.size / draw.cohort.num_clients
    return [client for client in draw.clients if draw.generator.random() < rate]


def _weighted(draw: _Draw) -> list[str]:
    return drawn_by_weight(draw.clients, draw.number, draw.generator)


def _power_of_choice(draw: _Draw) -> list[str]:
    # With only as many candidates as are drawn, losses would decide nothing.
    wanted = draw.cohort.candidates or 2 * draw.cohort.size
    candidates = drawn_by_weight(draw.clients, max(wanted, draw.number), draw.generator)
    losses = last_losses(draw.past)
    # Sorting is stable, so clients without a loss, and those of equal loss, keep the order they were drawn in
    return sorted(candidates, key=lambda client: -losses.get(client, math.inf))[: draw.number]


def _oort(draw: _Draw) -> list[str]:
    scores = _oort_scores(draw)
    unknown = {client: rows for client, rows in draw.clients.items() if client not in scores}
    share = max(LEAST_EXPLORATION, EXPLORATION * EXPLORATION_DECAY ** (draw.round_num - 1))
    num_known = min(len(scores), max(round(draw.number * (1 - share)), draw.number - len(unknown)))
    ranked = sorted(scores, key=lambda client: -scores[client])
    cut = CUT_OFF * scores[ranked[num_known - 1]] if num_known else math.inf
    best = {client: scores[client] for client in ranked if scores[client] >= cut}
    known = drawn_by_weight(best, num_known, draw.generator)
    return known + drawn_by_weight(unknown, draw.number - num_known, draw.generator)


def _oort_scores(draw: _Draw) -> dict[str, float]:
    """Return the score of every available client that has trained before.

    Oort's utility is rows * sqrt(mean of squared losses); a client reports only the mean of its losses, which
    is used in its place. It is scaled to at most 1, and grows with the rounds since the client's last turn.
    """
    losses = last_losses(draw.past)
    last_round: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for record in draw.past:
        last_round.update(dict.fromkeys(record.training.losses, record.round_num))
        seconds.update(record.training.seconds)
    utilities = {client: rows * losses[client] for client, rows in draw.clients.items() if client in losses}
    largest = max(utilities.values(), default=0.0) or 1.0  # all losses may be zero
    preferred = draw.cohort.preferred_seconds
    scores = {}
    for client, utility in utilities.items():
        uncertainty = math.sqrt(UNCERTAINTY * math.log(draw.round_num) / last_round[client])
        is_slow = preferred and seconds.get(client, 0.0) > preferred
        penalty = (preferred / seconds[client]) ** SLOWNESS_POWER if is_slow else 1.0
        scores[client] = (utility / largest + uncertainty) * penalty
    return scores


def drawn_by_weight(weights: Mapping[str, float], number: int, generator: random.Random) -> list[str]:
    """Return up to `number` names in the order drawn, each draw proportional to the weights that are left.

    Without replacement, by exponential keys (Efraimidis & Spirakis 2006): the chance of being among those
    drawn is not itself proportional to the weight, unless one is drawn. Weights are above 0.
    """
    # 1 - u lies in (0, 1], where the logarithm is finite
    keys = {name: math.log(1.0 - generator.random()) / weight for name, weight in weights.items()}
    return sorted(keys, key=lambda name: -keys[name])[:number]


RULES: Mapping[str, _Rule] = {
    "uniform": _uniform,
    "weighted": _weighted,
    "poisson": _poisson,
    "power-of-choice": _power_of_choice,
    "oort": _oort,
}
