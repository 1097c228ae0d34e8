"""Who is in the secret sums of a round, under which label and terms."""

from collections.abc import Mapping
from secrets import token_bytes

from fedllm.adapters.parts import part_size
from fedllm.engine.optimizer import largest_move
from fedllm.messages import JoinedClient
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan
from fedllm.secure.parties import Exchange, Party, in_groups, label_of
from fedllm.secure.vector import NUM_NUMBERS
from fedllm.wire.masks import AskedSum
from strategies.cohort.voices import largest_weight
from strategies.privacy import clip_of, largest_noise
from strategies.secure.methods import METHODS, Method, PartySum
from strategies.secure.relay_round import RelayRound
from strategies.secure.secret_round import SecretRound
from strategies.session import Session


def open_secret_round(
    session: Session, state: ServerState, plan: RoundPlan
) -> SecretRound | RelayRound | None:
    """Return the secret sums of an attempt at a round, None where the run has none."""
    if session.plan.secure is None:
        return None
    hosted = session.by_node(plan.asked).values()
    # Under wire.node-sum a node's clients go by the name and key of the first of them.
    parties = {
        group[0]: tuple(group)
        for clients in hosted
        for group in ([clients] if session.plan.aggregation.node_sum else [[one] for one in clients])
    }
    label = label_of(
        session.config.run.name, session.plan.digest, plan.round_num, plan.attempt, token_bytes(16)
    )
    keys = [_party(session.clients[name]) for name in parties]
    groups = in_groups(keys, label) if keys else []
    # One for all groups, so that their means can be compared, and for all clients, who see to it themselves.
    cap = max((_most(session, plan, client) for group in parties.values() for client in group), default=1.0)
    if session.plan.secure.is_blind:
        exchange = groups[0] if groups else Exchange(label, ())
        return RelayRound(session, plan, _asked(session, state, plan, exchange, parties, cap), parties)
    method = METHODS[session.plan.secure.method]
    sums = [_group(session, state, plan, method, group, parties, cap) for group in groups]
    return SecretRound(session, plan, method, sums)


def _group(
    session: Session,
    state: ServerState,
    plan: RoundPlan,
    method: Method,
    exchange: Exchange,
    parties: Mapping[str, tuple[str, ...]],
    weight_cap: float,
) -> PartySum:
    clients = {party: parties[party] for party in exchange.names}
    asked = _asked(session, state, plan, exchange, parties, weight_cap)
    size = part_size(session.layout, plan.returned) + NUM_NUMBERS
    return method.new_sum(session, plan.attempt, asked, clients, size)


def _asked(
    session: Session,
    state: ServerState,
    plan: RoundPlan,
    exchange: Exchange,
    parties: Mapping[str, tuple[str, ...]],
    weight_cap: float,
) -> AskedSum:
    members = tuple(client for party in exchange.names for client in parties[party])
    return AskedSum(
        exchange=exchange,
        num_clients=len(members),
        weight_cap=weight_cap,
        # What the optimizer can have moved a value by, plus the noise a client may have added.
        largest=largest_move(plan.training, plan.largest_start) + largest_noise(session.privacy),
        clients=members,
    ).agreed(plan.round_num, state.adapter.digest, state.base_delta.digest, clip_of(session.privacy, state))


def _party(client: JoinedClient) -> Party:
    return Party(client.client_id, client.run_key, client.identity, client.key_signature)


def _most(session: Session, plan: RoundPlan, client: str) -> float:
    """Return the most that a client may weigh beside the others of its round."""
    declared = largest_weight(session.clients[client], session.plan)
    return min(declared, plan.most_weights.get(client, declared))
