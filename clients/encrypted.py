"""A client's half of `secure.method = he`: its vector leaves encrypted, and the key holder decrypts the sum.

The key holder is one of the parties. It decrypts one ciphertext for each label, and cannot tell whether that
is the sum (`fedllm.secure.homomorphic`).
"""

import hashlib

import numpy as np
from flwr.app import RecordDict

from clients.data_holder import DataHolder
from clients.parties import OwnParty, forget_keys, kept_exchange, own_keys, own_parties
from clients.technique import failure_of
from clients.train_parties import train_parties
from fedllm.adapters.parts import part_size
from fedllm.errors import BadPartiesError, CheckpointError, SecureError, TooFewPartiesError
from fedllm.messages import ClientFailure, TrainRequest
from fedllm.secure.homomorphic import decrypt, encrypt, key_digest
from fedllm.secure.ring import BITS, pack
from fedllm.secure.vector import NUM_NUMBERS
from fedllm.wire.encrypted import Decrypting, KeyHolder, read_decrypt, read_key_holders, write_encrypted
from fedllm.wire.masks import read_sums, write_openings


def train_encrypted(holder: DataHolder, request: TrainRequest, content: RecordDict) -> RecordDict:
    """Return the answer to a train request: an encrypted vector for each party, and no number of its clients.

    Raises:
        BadPartiesError, TooFewPartiesError: a client might not be hidden in the sum; nothing is trained.
    """
    sums = read_sums(content)
    key_holders = dict(
        zip((asked.exchange.label for asked in sums), read_key_holders(content, len(sums)), strict=True)
    )
    parties = own_parties(holder, request, sums)
    for party in parties:
        _check_key(party, key_holders[party.asked.exchange.label])

    def hide(party: OwnParty, words: np.ndarray) -> bytes:
        return encrypt(key_holders[party.asked.exchange.label].public_key, words, BITS)

    return write_encrypted(*train_parties(holder, request, parties, hide))


def _check_key(party: OwnParty, key_holder: KeyHolder) -> None:
    """Refuse a key that is not that of a party: whoever has its other half reads the sum."""
    known = {one.name: one.run_key for one in party.asked.exchange.parties}
    if known.get(key_holder.name) != key_digest(key_holder.public_key):
        raise BadPartiesError(
            f"the key to encrypt with is not that of {key_holder.name}, or that is no party of the secret sum"
        )


def answer_decrypt(holder: DataHolder, content: RecordDict) -> RecordDict:
    """Return the words of each sum that a client of this node decrypts; or end the run's keys.

    Raises:
        OtherConfigError: the question is of another run.
    """
    round_num, sums = read_decrypt(content, holder.plan.digest)
    if not sums:  # the run is over
        forget_keys(holder)
    part = holder.plan.aggregation.returned_in(round_num)
    size = part_size(holder.engine.layout, part) + NUM_NUMBERS
    opened: dict[str, bytes | ClientFailure] = {}
    for one in sums:
        try:
            opened[one.key_holder] = _decrypt(holder, one, size)
        except (SecureError, CheckpointError) as error:
            opened[one.key_holder] = failure_of(one.key_holder, error)
    return write_openings(opened)


def _decrypt(holder: DataHolder, asked: Decrypting, size: int) -> bytes:
    keys = own_keys(holder, asked.key_holder)
    exchange = kept_exchange(keys, asked.label)
    answered = set(asked.answered)
    if not answered <= set(exchange.names) or len(answered) < exchange.threshold:
        raise TooFewPartiesError(
            f"the sum of {len(answered)} parties is not decrypted, {exchange.threshold} are needed"
        )
    ciphertext = hashlib.sha256(asked.content).hexdigest()
    keys.note(asked.label, "opened", {"answered": sorted(answered), "ciphertext": ciphertext})
    return pack(decrypt(keys.encryption.secret, asked.content, size, BITS))
