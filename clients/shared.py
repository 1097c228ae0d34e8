"""A client's half of `secure.method = shares`: the server passes sealed shares on and learns no sum.

Holders add up the shares that parties sealed for them, and open their sums to all parties. Each then has the
total and goes on from an adapter of its own (`clients.own_adapter`); at the end of the run one party gives
its adapter away, to be published. The arithmetic is in `fedllm.secure.additive`.
"""

import numpy as np
import torch
from flwr.app import RecordDict

from clients.data_holder import DataHolder
from clients.own_adapter import from_own_adapter, keep_own_adapter, next_adapter, own_adapter
from clients.parties import OwnParty, exchange_of, forget_keys, own_keys, own_parties, told_of
from clients.run_keys import RunKeys
from clients.technique import failure_of
from clients.train_parties import train_parties
from fedllm.adapters.parts import part_size, whole_of
from fedllm.errors import BadPartiesError, CheckpointError, NotHeldError, SecureError
from fedllm.messages import ClientFailure, TrainRequest
from fedllm.secure.additive import Opening, Relay, add_share, open_sum, share, total_of
from fedllm.secure.vector import NUM_NUMBERS, Scale, read_sum
from fedllm.site_policy import load_policy
from fedllm.wire.masks import read_sums, write_openings
from fedllm.wire.shared import HOLD, TOTAL, RelayQuestion, read_holders, read_relay_question, write_shared


def train_shared(holder: DataHolder, request: TrainRequest, content: RecordDict) -> RecordDict:
    """Return the answer to a train request: for each party a box for each holder, and no number.

    Raises:
        BadPartiesError, TooFewPartiesError: a client might not be hidden in the sum; nothing is trained.
        NotHeldError: its clients have not the adapter that the round starts from.
    """
    request = from_own_adapter(holder, request, request.round_num - 1)
    holders = read_holders(content)
    parties = own_parties(holder, request, read_sums(content))
    if len({party.asked.exchange.label for party in parties}) > 1:
        raise BadPartiesError("a round has one sum of shares, of all its parties")
    for party in parties:  # before anything is trained: who fails then still reads the sum of the others
        relay = Relay(party.asked.exchange, holders)
        _check_sites(relay)
        _note(party, relay, request.round_num)

    def hide(party: OwnParty, words: np.ndarray) -> tuple[bytes, ...]:
        relay = Relay(party.asked.exchange, holders)
        boxes = share(party.name, party.keys.private, relay, words, party.keys.secret)
        return tuple(boxes[name] for name in holders)

    return write_shared(*train_parties(holder, request, parties, hide))


def answer_relay(holder: DataHolder, content: RecordDict) -> RecordDict:
    """Return what the clients that are asked open: a sum of shares, or a digest or values of their adapter.

    Raises:
        OtherConfigError: the question is of another run.
    """
    asked = read_relay_question(content, holder.plan.digest)
    if not asked.kind:  # the run is over
        forget_keys(holder)
    answer = {HOLD: _hold, TOTAL: _go_on}.get(asked.kind, _publish)
    opened: dict[str, bytes | ClientFailure] = {}
    for name in asked.clients:
        try:
            opened[name] = answer(holder, name, asked)
        except (SecureError, CheckpointError, NotHeldError) as error:
            opened[name] = failure_of(name, error)
    return write_openings(opened)


def _hold(holder: DataHolder, name: str, asked: RelayQuestion) -> bytes:
    """Return the sum of the shares that a client holds, sealed for each party."""
    keys = own_keys(holder, name)
    relay, round_num, _ = _noted(holder, keys, asked.label)
    total = np.zeros(_size(holder, round_num), np.uint32)
    for sender, box in asked.parts.items():
        add_share(total, name, keys.private, relay, sender, box)
    opening = open_sum(name, keys.private, relay, asked.answered, total, keys.secret)
    keys.note(asked.label, "opened", {"answered": sorted(asked.answered)})
    return opening.to_bytes()


def _go_on(holder: DataHolder, name: str, asked: RelayQuestion) -> bytes:
    """Return the digest of the adapter after a round, which a client keeps by then."""
    keys = own_keys(holder, name)
    relay, round_num, scale = _noted(holder, keys, asked.label)
    openings = {sender: Opening.from_bytes(data, relay) for sender, data in asked.parts.items()}
    size = _size(holder, round_num)
    words = total_of(name, keys.private, relay, asked.answered, openings, size)
    found, start = read_sum(words, scale), own_adapter(holder, name, round_num - 1)
    part = holder.plan.aggregation.returned_in(round_num)
    change_P = whole_of(start.layout, torch.from_numpy(found.mean).float(), part)
    state = next_adapter(start, change_P)
    # Under wire.node-sum a party speaks for all clients of its node.
    for each in holder.clients if holder.plan.aggregation.node_sum else (name,):
        keep_own_adapter(holder, each, round_num, state)
    return bytes.fromhex(state.digest)


def _publish(holder: DataHolder, name: str, asked: RelayQuestion) -> bytes:
    """Return the values of the adapter after the last round, which is to be published."""
    last = holder.plan.config.federation.num_rounds
    if asked.round_num != last:  # an earlier one would tell of the rounds in between
        raise SecureError(f"the adapter of round {asked.round_num} is not published, that of round {last} is")
    return own_adapter(holder, name, last).vector.numpy().astype("<f4").tobytes()


def _check_sites(relay: Relay) -> None:
    """Refuse holders of one site, where this one names its peers: they would be one holder."""
    identities = {party.identity for party in relay.exchange.parties if party.name in relay.holders}
    if load_policy().peers and len(identities) < len(relay.holders):
        raise BadPartiesError("two of the parties that hold shares are of one site")


def _size(holder: DataHolder, round_num: int) -> int:
    part = holder.plan.aggregation.returned_in(round_num)
    return part_size(holder.engine.layout, part) + NUM_NUMBERS


def _note(party: OwnParty, relay: Relay, round_num: int) -> None:
    """Keep what a party was told of a sum, once and for all under its label."""
    asked, exchange = party.asked, party.asked.exchange
    values = {
        "round": round_num,
        "holders": list(relay.holders),
        "numbers": [asked.num_clients, asked.largest, asked.weight_cap],
        **told_of(exchange),
    }
    party.keys.note(exchange.label, "asked", values)


def _noted(holder: DataHolder, keys: RunKeys, label: bytes) -> tuple[Relay, int, Scale]:
    """Return what a party was told of a sum: its parties and holders, its round, what its words mean."""
    kept = keys.noted(label, "asked")
    num_clients, largest, weight_cap = kept["numbers"]
    scale = Scale(
        num_clients=num_clients,
        largest=largest,
        weight_cap=weight_cap,
        most_tokens=holder.plan.most_tokens(kept["round"]),
    )
    return Relay(exchange_of(label, kept), tuple(kept["holders"])), kept["round"], scale
