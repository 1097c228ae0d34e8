"""What a server reads in a run of secret sums: the sum of all clients, and one message that says nothing.

The clients mask as in a run (`clients.parties`, `fedllm.secure.masking`), with keys and a label of the
audit's own. Next to one client's message stands the same one in plain, as the control: what the masks hide.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

import torch

from clients.parties import OwnParty, declare_party, party_words
from clients.run_keys import run_keys
from clients.train import train_clients
from fedllm.adapters.parts import part_size, whole_of
from fedllm.engine.optimizer import largest_move
from fedllm.errors import RunFailedError
from fedllm.messages import ClientFailure, ClientUpdate, TrainRequest
from fedllm.secure.agreement import new_key, public_of, secret_stream
from fedllm.secure.masking import mask, plain_sum
from fedllm.secure.parties import LABEL_BYTES, Exchange, Party
from fedllm.secure.ring import unpack, value_of
from fedllm.secure.vector import NUM_NUMBERS, Scale, client_values, read_sum, words_of
from fedllm.wire.masks import AskedSum
from scripts.auditing.messages import Message, message_of, request_of, smallest_client
from scripts.auditing.opening import Case


def secret_messages(case: Case) -> list[Message]:
    """Return what the server learns of a round, and what it has of one client: masked, and as it was.

    Raises:
        RunFailedError: a client cannot do the round.
    """
    holder, request = case.holder, request_of(case)
    layout, part = holder.engine.layout, holder.plan.aggregation.returned_in(request.round_num)
    label = secrets.token_bytes(LABEL_BYTES)
    updates = _trained(case, request, label)
    parties = _parties(case, request, label, [*updates.values()])
    words = {party.name: party_words(holder, request, party, [updates[party.name]]) for party in parties}
    asked, name = parties[0].asked, smallest_client(holder)
    noise = holder.plan.shared_noise(num_values=part_size(layout, part), num_parties=len(parties))
    scale = asked.scale(holder.plan.most_tokens(request.round_num), noise)
    total = plain_sum([*words.values()])
    keys = run_keys(holder.state_path, holder.plan, name)
    masked = mask(name, keys.private, asked.exchange, words[name], keys.secret)
    seen = value_of(unpack(masked.packed, len(total))[:-NUM_NUMBERS], scale.step)
    learnt, hidden = (
        whole_of(layout, torch.from_numpy(values_Q).float(), part)
        for values_Q in (read_sum(total, scale).mean, seen)
    )
    alone = replace(request, drawn={name: 0}, ranks={name: request.ranks[name]})
    single = {"one message, masked": hidden, "one message, in plain": updates[name].delta}
    return [message_of(case, request, {"update": learnt}), message_of(case, alone, single)]


def under_masks(vector_Q: torch.Tensor) -> torch.Tensor:
    """Return what a server has of a vector that one of three parties adds to a secret sum: masked words."""
    privates = {name: new_key() for name in ("a", "b", "c")}
    parties = tuple(Party(name, public_of(private)) for name, private in privates.items())
    exchange = Exchange(secrets.token_bytes(LABEL_BYTES), parties)
    largest = float(vector_Q.abs().max())
    scale = Scale(num_clients=len(parties), largest=largest, weight_cap=1.0, most_tokens=1)
    values = client_values(vector_Q.double().numpy(), weight=1.0, num_tokens=0, loss=0.0, scale=scale)
    words = words_of(values, scale, secret_stream(privates["a"], "rounding"))
    masked = mask("a", privates["a"], exchange, words, privates["a"])
    return torch.from_numpy(value_of(unpack(masked.packed, len(words)), scale.step)[:-NUM_NUMBERS]).float()


def _trained(case: Case, request: TrainRequest, label: bytes) -> dict[str, ClientUpdate]:
    updates = {}
    for answer in train_clients(case.holder, request, labels=dict.fromkeys(request.drawn, label)):
        if isinstance(answer, ClientFailure):
            raise RunFailedError(f"client {answer.client_id} cannot do a round again: {answer.code}")
        updates[answer.client_id] = answer
    return updates


def _parties(
    case: Case, request: TrainRequest, label: bytes, updates: Sequence[ClientUpdate]
) -> list[OwnParty]:
    """Return each client as a party of one sum, as the run's server would ask for it."""
    holder, privacy = case.holder, case.holder.plan.privacy
    training, start = holder.plan.training(request.round_num), float(request.adapter.vector.abs().max())
    declared = sorted((declare_party(holder, one.client_id) for one in updates), key=attrgetter("name"))
    asked = AskedSum(
        exchange=Exchange(label, tuple(declared)),
        num_clients=len(updates),
        weight_cap=max(update.weight for update in updates),
        largest=largest_move(training, start) + (0.0 if privacy is None else privacy.largest_noise),
        clients=tuple(update.client_id for update in updates),
    )
    return [
        OwnParty(party.name, (party.name,), asked, run_keys(holder.state_path, holder.plan, party.name))
        for party in declared
    ]
