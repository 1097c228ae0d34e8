"""A client's part in a secret sum, by whatever method: with whom it is, and what it adds.

Under `wire.node-sum` the clients of a node are one party, under the name and key of the first of them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clients.data_holder import DataHolder
from clients.run_keys import RunKeys, run_keys
from fedllm.adapters.parts import part_of, part_size
from fedllm.errors import BadPartiesError
from fedllm.identity import load_key, public_text, sign
from fedllm.messages import ClientUpdate, TrainRequest
from fedllm.privacy.distributed import noised_words
from fedllm.secure.agreement import derived, public_of, secret_stream
from fedllm.secure.homomorphic import key_digest
from fedllm.secure.parties import Exchange, Party, check_parties, party_statement
from fedllm.secure.vector import client_values, number_words, words_of
from fedllm.site_policy import SitePolicy, load_policy
from fedllm.wire.masks import AskedSum


@dataclass(frozen=True, eq=False)
class OwnParty:
    """A party that this node is in a secret sum: the clients it adds up, and what it keeps for the sum."""

    name: str
    clients: tuple[str, ...]
    asked: AskedSum
    keys: RunKeys


def declare_party(holder: DataHolder, client_id: str) -> Party:
    """Return what a client shows of itself when it joins a run of secret sums: its key, signed by its site.

    Raises:
        CheckpointError: the key of the run cannot be kept.
        ConfigError: this machine's site.toml names a key that cannot be used.
    """
    policy, plan = load_policy(), holder.plan
    run_key = _run_key(holder, client_id)
    if not policy.site.key:
        return Party(client_id, run_key)
    key = load_key(policy.path(policy.site.key))
    signed = party_statement(plan.config.run.name, plan.digest, client_id, run_key)
    return Party(client_id, run_key, public_text(key), sign(key, signed))


def own_parties(holder: DataHolder, request: TrainRequest, sums: Sequence[AskedSum]) -> list[OwnParty]:
    """Return the parties that the clients of a request are in its sums; each has been checked.

    Raises:
        BadPartiesError, TooFewPartiesError: a client might not be hidden there, or is in no sum.
    """
    plan, found = holder.plan, []
    for told in sums:
        # What was sent to this node, not what it should have been: with any other terms no mask comes off.
        asked = told.agreed(
            request.round_num, request.adapter.digest, request.base_delta.digest, request.clip
        )
        names = asked.clients
        for group in [names] if plan.aggregation.node_sum else [(name,) for name in names]:
            found.append(OwnParty(group[0], group, asked, own_keys(holder, group[0])))
    placed = [name for party in found for name in party.clients]
    if sorted(placed) != sorted(request.drawn):  # also where one is in two sums, which would tell it apart
        raise BadPartiesError("the request does not place each of its clients in one secret sum")
    if set(request.ranks.values()) != {plan.config.lora.rank}:  # above it a client would be alone
        raise BadPartiesError("clients of a secret sum train at one rank, that of the run")
    policy = load_policy()
    for party in found:
        _check(holder, policy, party)
    return found


def _check(holder: DataHolder, policy: SitePolicy, party: OwnParty) -> None:
    plan, peers = holder.plan, None
    assert plan.secure is not None, "a run without secret sums has no parties"
    if policy.peers:
        own = [public_text(load_key(policy.path(policy.site.key)))] if policy.site.key else []
        peers = {*policy.peers.values(), *own}
    check_parties(
        party.asked.exchange,
        party.name,
        _run_key(holder, party.name),
        run=plan.config.run.name,
        plan_digest=plan.digest,
        min_parties=max(plan.secure.min_parties, policy.allow.min_parties),
        peers=peers,
    )


def party_words(
    holder: DataHolder, request: TrainRequest, party: OwnParty, updates: Sequence[ClientUpdate]
) -> np.ndarray:
    """Return what a party adds to its sum, as words (uint32); by then its ledger holds it under the label.

    Raises:
        MaskReuseError: it has added something else under this label.
        CheckpointError: the ledger cannot be written.
        SecureError: a value is not finite.
    """
    plan, asked, exchange = holder.plan, party.asked, party.asked.exchange
    layout, part = request.adapter.layout, plan.aggregation.returned_in(request.round_num)
    num_values = part_size(layout, part)
    noise = plan.shared_noise(num_values=num_values, num_parties=len(exchange.parties))
    scale = asked.scale(plan.most_tokens(request.round_num), noise)
    values = sum(
        client_values(
            part_of(layout, update.delta, part).double().numpy(),
            weight=update.weight,
            num_tokens=update.num_tokens,
            loss=update.train_loss,
            scale=scale,
        )
        for update in updates
    )
    assert isinstance(values, np.ndarray), "a party adds at least one update"
    # Rounding that anyone could draw again would tell the fraction that it rounds.
    stream = secret_stream(
        party.keys.secret, "rounding", exchange.digest, hashlib.sha256(values.data).digest()
    )
    if noise is None:
        words = words_of(values, scale, stream)
    else:
        # In another sum other noise, or the difference of both would have one share of it alone.
        key = derived(party.keys.secret, "share of noise", exchange.digest)
        delta = noised_words(values[:num_values], noise, key)
        words = np.concatenate([delta, number_words(values[num_values:], scale, stream)])
    kept = {"vector": hashlib.sha256(words.data).hexdigest(), **told_of(exchange)}
    party.keys.note(exchange.label, "masked", kept)
    return words


def own_keys(holder: DataHolder, client_id: str) -> RunKeys:
    """Return what a client of this node keeps for the secret sums of the run.

    Raises:
        BadPartiesError: it is none of this node's; a name that a server makes up must not become a path.
    """
    if client_id not in holder.clients:
        raise BadPartiesError(f"this node has no client {client_id!r}", client_id)
    return run_keys(holder.state_path, holder.plan, client_id)


def forget_keys(holder: DataHolder) -> None:
    """Remove all keys of a run that is over, and all that is kept of its sums."""
    for name in holder.clients:
        own_keys(holder, name).forget()


def told_of(exchange: Exchange) -> dict[str, Any]:
    """Return what a ledger keeps of a secret sum: who is in it, with which keys, under which terms."""
    parties = [[each.name, each.run_key.hex()] for each in exchange.parties]
    return {"terms": exchange.terms.hex(), "parties": parties}


def exchange_of(label: bytes, kept: Mapping[str, Any]) -> Exchange:
    """Return the secret sum of a label that `told_of` has described."""
    parties = tuple(Party(name, bytes.fromhex(run_key)) for name, run_key in kept["parties"])
    return Exchange(label, parties, bytes.fromhex(kept["terms"]))


def kept_exchange(keys: RunKeys, label: bytes) -> Exchange:
    """Return the secret sum that a party has added to under a label; raises as `RunKeys.noted`."""
    return exchange_of(label, keys.noted(label))


def public_key(holder: DataHolder, client_id: str) -> bytes:
    """Return a client's key for encryption, b"" where the run's sums are not encrypted.

    Raises:
        CheckpointError, MissingExtraError: it cannot be kept, or TenSEAL is not installed.
    """
    secure = holder.plan.secure
    if secure is None or secure.method != "he":
        return b""
    return own_keys(holder, client_id).encryption.public


def _run_key(holder: DataHolder, client_id: str) -> bytes:
    """Return what a client goes by among the parties: a key to agree with, or the digest of the other."""
    encrypts = public_key(holder, client_id)
    return key_digest(encrypts) if encrypts else public_of(own_keys(holder, client_id).private)
