"""Updates that come late: buffered asynchronous aggregation (FedBuff, arXiv 2106.06639).

A round closes with the updates of a cohort, whoever sent them first. Nodes still under way are not asked
again; what they send is folded into the round in which it arrives, on top of that round's adapter, and weighs
less the more rounds it is late. Which updates a round gets then depends on who was quick: only a run without
late ones is repeated bit for bit.
"""

from dataclasses import replace

from fedllm.messages import ClientFailure, ClientUpdate

EXPONENT = 0.5  # FedBuff's own: the square root


def staleness_weight(rounds: int) -> float:
    """Return what a late update's weight is multiplied by: 1 / (1 + rounds)^EXPONENT.

    The weights of a round are normalised afterwards: a late update counts less than fresh ones, and a round
    of equally late ones moves as far as a fresh one. FedBuff itself divides by the number of updates.
    """
    return float((1 + rounds) ** -EXPONENT)


def discounted(update: ClientUpdate, round_num: int) -> ClientUpdate:
    """Return an update, and the members of a sum, with the weight it has in round `round_num`."""
    factor = staleness_weight(round_num - update.round_num)
    # Records show the weights of members, so theirs must add up to the sum's
    members = tuple(replace(member, weight=member.weight * factor) for member in update.members)
    return replace(update, weight=update.weight * factor, members=members)


def late_refusal(answer: ClientUpdate | ClientFailure, round_num: int, largest_staleness: int) -> str:
    """Return why the answer to an earlier request does not count in round `round_num`, or ""."""
    if isinstance(answer, ClientFailure):
        return f"client {answer.client_id}: a late reply does not count: {answer.reason or answer.code}"
    rounds = round_num - answer.round_num
    if rounds <= largest_staleness:
        return ""
    return f"client {answer.client_id}: its update of round {answer.round_num} is {rounds} rounds late"
