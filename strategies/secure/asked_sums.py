"""Who is in which secret sum of an attempt at a round, and under which terms."""

from collections.abc import Mapping
from secrets import token_bytes

from fedllm.messages import JoinedClient
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan
from fedllm.secure.parties import Party, in_groups, label_of
from fedllm.wire.masks import AskedSum
from strategies.cohort.voices import largest_weight
from strategies.exchange.receiving import largest_change
from strategies.privacy import clip_of
from strategies.session import Session


def parties_of(session: Session, plan: RoundPlan) -> dict[str, tuple[str, ...]]:
    """Return the clients that each party of a round speaks for.

    Under `wire.node-sum` a node's clients go by the name and key of the first of them.
    """
    hosted = session.by_node(plan.asked).values()
    return {
        group[0]: tuple(group)
        for clients in hosted
        for group in ([clients] if session.plan.aggregation.node_sum else [[one] for one in clients])
    }


def asked_sums(
    session: Session, state: ServerState, plan: RoundPlan, parties: Mapping[str, tuple[str, ...]]
) -> list[AskedSum]:
    """Return the sums of these parties, one for each group, under labels that were never used before."""
    config, digest = session.config, session.plan.digest
    label = label_of(config.run.name, digest, plan.round_num, plan.attempt, token_bytes(16))
    groups = in_groups([_party(session.clients[name]) for name in parties], label)
    members = [tuple(client for name in group.names for client in parties[name]) for group in groups]
    # One for all groups, so that their means can be compared, and for all clients, who see to it themselves.
    weight_cap = max(_most(session, plan, client) for group in members for client in group)
    largest = largest_change(session, plan)
    return [
        AskedSum(
            exchange=group,
            num_clients=len(clients),
            weight_cap=weight_cap,
            largest=largest,
            clients=clients,
        ).agreed(
            plan.round_num, state.adapter.digest, state.base_delta.digest, clip_of(session.privacy, state)
        )
        for group, clients in zip(groups, members, strict=True)
    ]


def _party(client: JoinedClient) -> Party:
    return Party(client.client_id, client.run_key, client.identity, client.key_signature)


def _most(session: Session, plan: RoundPlan, client: str) -> float:
    """Return the most that a client may weigh beside the others of its round."""
    declared = largest_weight(session.clients[client], session.plan)
    return min(declared, plan.most_weights.get(client, declared))
