"""What a run of secret sums has hidden from its server, and what that rests on: a section of its card."""

from collections.abc import Collection

from fedllm.messages import JoinedClient
from fedllm.plan.secure import SecurePlan
from fedllm.secure.parties import threshold_of

_UNSEEN = (
    "the server learns the sum of a round's updates, weights, tokens and losses, and no single one of them"
)
_UNSEEN_BY_RELAY = "the server passed sealed boxes on and learnt no sum, and no adapter before this one"

_BREAKS = {
    "shares": """Three data holders held the shares of a round: together, and only together, they could read
every update.""",
    "masks": "Parties that work with the server learn with it the sum over the others.",
    "he": """In each round one data holder could decrypt the sum. It and the server together could read every
update, and it cannot tell a sum from one update: that the server gave it nothing else to decrypt is not
proved. Masks ask for less trust.""",
}


def card_text(plan: SecurePlan, clients: Collection[JoinedClient]) -> str:
    """Return the section of a model card on what its server saw."""
    pinned = sum(client.is_pinned for client in clients)
    least, unseen = threshold_of(plan.min_parties), _UNSEEN_BY_RELAY if plan.is_blind else _UNSEEN
    return f"""## What the server saw

Secret sums by `secure.method = {plan.method}`: {unseen}. It also learnt who took part in which round, and
what data holders declare when they join or measure on held-out rows. A sum is formed among at least
{plan.min_parties} parties and over at least two thirds of them ({least} of {plan.min_parties}).
{_BREAKS[plan.method]}
A forged update bends the sum and cannot be told from an honest one.
{pinned} of {len(clients)} data holders say that their site runs only code it has pinned; to the others the
server might have shipped code that sends updates in the clear. No cryptographer has reviewed the argument
(docs/secret-sums.md).
"""
