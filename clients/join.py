"""What a node answers when it is asked to join: the clients it hosts and their sizes, signed by its site."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from flwr.app import RecordDict

from clients.coarse import coarse_joined
from clients.data_holder import DataHolder
from clients.lost_rows import describe_left_out
from clients.parties import declare_party, public_key
from fedllm.errors import RowsLostError
from fedllm.identity import load_key, public_text, sign
from fedllm.messages import JoinedClient
from fedllm.privacy.keys import derived_key, kept_secret
from fedllm.site_policy import load_policy
from fedllm.wire.joining import Proof, consent_statement, join_statement, read_question, write_joined
from fedllm.wire.libraries import check_libraries

_SALT = "commitment-secret"  # in the state folder
_logger = logging.getLogger("fedllm.clients")


def answer_join(holder: DataHolder, question: RecordDict, node_id: int) -> RecordDict:
    """Return the answer to a request to join.

    Raises:
        OtherVersionError: the server has another major version of a library.
    """
    check_libraries(question.config_records.get("libraries", {}))
    declared = with_consent(holder, declare_clients(holder, node_id))
    return write_joined(declared, prove(holder, question, declared))


def declare_clients(holder: DataHolder, node_id: int) -> list[JoinedClient]:
    """Return what this node's clients declare: sizes and base model, no text.

    Which of them are left out, as they lose too many rows, is logged here, where a run begins.
    """
    if told := describe_left_out(holder.counts, holder.plan.config.train.max_length):
        _logger.warning("%s", told)
    # The server holds later updates to these sizes, and compares base models by their fingerprint.
    joined = [
        JoinedClient(
            client_id=client.client_id,
            node_id=node_id,
            num_train=client.num_rows,
            num_held_out=len(client.held_out) if client.num_public is None else 0,
            max_rank=holder.max_rank,
            fingerprint=holder.fingerprint,
            cause=RowsLostError.code if client.is_left_out else "",
        )
        for client in holder.clients.values()
    ]
    policy = load_policy()
    if not policy.allow.exact_numbers:
        joined = [coarse_joined(client) for client in joined]
    if holder.plan.secure is None:
        return joined
    # Where a site names bundles, the gate has let no other code ask.
    is_pinned = bool(policy.allow.bundles)
    return [_with_key(holder, client, is_pinned=is_pinned) for client in joined]


def _with_key(holder: DataHolder, client: JoinedClient, *, is_pinned: bool) -> JoinedClient:
    party = declare_party(holder, client.client_id)
    return replace(
        client,
        run_key=party.run_key,
        key_signature=party.signature,
        is_pinned=is_pinned,
        public_key=public_key(holder, client.client_id),
    )


def with_consent(holder: DataHolder, clients: Sequence[JoinedClient]) -> list[JoinedClient]:
    """Return clients with a commitment to their rows, and the site's signed consent that these serve the run.

    The commitment is salted by a secret of the site's and by the run, so it says nothing of the rows, nor
    whether runs of other names had the same; the site can show later which rows it stands for. Without a key
    of the site there is neither.

    Raises:
        ConfigError: this machine's site.toml names a key that cannot be used.
        CheckpointError: the secret cannot be kept.
    """
    policy, plan = load_policy(), holder.plan
    if not policy.site.key:
        return list(clients)
    key, secret = load_key(policy.path(policy.site.key)), kept_secret(policy.state_folder / _SALT)
    run, digest, purpose = plan.config.run.name, plan.digest, plan.config.run.purpose
    committed = []
    for client in clients:
        salted = derived_key(secret, run, digest, holder.clients[client.client_id].digest).hex()
        named = replace(client, commitment=salted)
        committed.append(replace(named, consent=sign(key, consent_statement(run, digest, purpose, named))))
    return committed


def prove(holder: DataHolder, question: RecordDict, clients: Sequence[JoinedClient]) -> Proof | None:
    """Return the site's signature of what its clients declare in answer to a question; None without a key.

    Raises:
        ConfigError: this machine's site.toml names a key that cannot be used.
        WireError: the question has no nonce.
    """
    policy = load_policy()
    if not policy.site.key:
        return None
    nonce, key = read_question(question), load_key(policy.path(policy.site.key))
    signed = join_statement(nonce, holder.plan.config.run.name, holder.plan.digest, clients)
    return Proof(public_text(key), sign(key, signed))
