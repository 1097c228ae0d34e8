"""One voice for each site: which clients have a place in the run, and how much a site's clients may weigh.

A node declares its clients and their rows itself. So that one cannot crowd out all others, by 5,000 clients
or by 10^15 rows, places are dealt to sites in turn, and a bound of what others weigh holds for the clients of
one site together. A node that no site has signed for is a site of its own: who opens many nodes has many
voices, which only a list of admitted sites prevents (`federation.sites`).
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

from fedllm.messages import ClientUpdate, JoinedClient
from fedllm.plan.run_plan import RunPlan
from strategies.sites import Sites

# Times the median site. Under a robust rule liars must be a minority by weight too: where nobody weighs more
# than the median, fewer than a quarter of the sites weigh less than half.
OVER_MEDIAN, OVER_MEDIAN_ROBUST = 10.0, 1.0


def voice_of(client: JoinedClient) -> str:
    """Return the name of the site that a client belongs to, else of its node."""
    return client.site or f"node {client.node_id}"


def with_places(
    clients: Mapping[str, JoinedClient], number: int, connected: Collection[int], *, is_bounded: bool = False
) -> dict[str, JoinedClient]:
    """Return the clients that have one of `number` places: the first of every site, then the second of each.

    Among equals those on `connected` nodes come first, then those that stand first in `clients`. Where it
    `is_bounded`, none of three or more sites has more places than all others together: else few sites in a
    federation of many places would have their cohorts drawn from one.
    """
    sizes = Counter(map(voice_of, clients.values()))
    turns: Counter[str] = Counter()
    ranked = []
    for place, client in enumerate(clients.values()):
        voice = voice_of(client)
        if not is_bounded or len(sizes) < 3 or turns[voice] < len(clients) - sizes[voice]:
            ranked.append((turns[voice], client.node_id not in connected, place, client.client_id))
        turns[voice] += 1
    kept = {ranks[-1] for ranks in sorted(ranked)[:number]}
    return {name: client for name, client in clients.items() if name in kept}


def largest_weight(joined: JoinedClient, plan: RunPlan) -> float:
    """Return the most a client may declare to weigh: its rows, the tokens a round can hold, or 1.

    Under product-norm the server itself measures what a client counts; under privacy.weight-cap it is at
    most 1.
    """
    train = plan.config.train
    if plan.privacy is not None and plan.privacy.weight_cap:
        return 1.0
    return {
        "examples": float(joined.num_train),
        "tokens": float(train.local_steps * train.batch_size * train.max_length),
        "uniform": 1.0,
        "product-norm": 1.0,
    }[plan.aggregation.weighting]


def shared_out(
    weights: Mapping[str, float], voices: Mapping[str, str], limits: Mapping[str, float], over_median: float
) -> dict[str, float]:
    """Return weights of which those of one voice sum to its limit at most, each scaled alike.

    The limit of a voice that has none of its own is `over_median` times the (lower) median of all voices.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    for client, weight in weights.items():
        totals[voices[client]] += weight
    usual = over_median * statistics.median_low(totals.values()) if totals else 0.0
    factors = {voice: min(1.0, limits.get(voice, usual) / total) for voice, total in totals.items() if total}
    return {client: weight * factors.get(voices[client], 1.0) for client, weight in weights.items()}


def weight_limits(clients: Collection[JoinedClient], plan: RunPlan, sites: Sites | None) -> dict[str, float]:
    """Return the most that every client may weigh in a round, in the unit of `aggregation.weighting`."""
    weights = {client.client_id: largest_weight(client, plan) for client in clients}
    voices = {client.client_id: voice_of(client) for client in clients}
    limits = {site.name: site.max_weight for site in (sites or {}).values() if site.max_weight}
    over = OVER_MEDIAN if plan.aggregation.robust == "none" else OVER_MEDIAN_ROBUST
    return shared_out(weights, voices, limits, over)


def limited(update: ClientUpdate, most: Mapping[str, float]) -> ClientUpdate:
    """Return an update that weighs no more than `most` of its client, or of the members of a sum together."""
    allowed = sum(
        min(each.weight, most.get(each.client_id, math.inf)) for each in update.members or (update,)
    )
    if allowed >= update.weight:
        return update
    factor = allowed / update.weight
    members = tuple(replace(member, weight=member.weight * factor) for member in update.members)
    return replace(update, weight=allowed, members=members)
