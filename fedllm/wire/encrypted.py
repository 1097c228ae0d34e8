"""Secret sums by homomorphic encryption as Flower records, as far as they differ from `fedllm.wire.masks`.

    train request     key-holder-0...  for each sum that concerns the node: who can decrypt -> its public key
    encrypted answer  clients          ids and codes, as in any answer; no metrics: numbers are in the sum
                      encrypted        party -> its encrypted vector
    question          request          round, plan, clients, whether the run is `over`, which ends all keys
                      decrypt-0...     for each sum: label, the parties that answered
                      summed-0...      the party that can decrypt -> the encrypted sum
    its answer        clients          ids and codes
                      openings         the party -> the words of the sum

What the bytes mean is in `fedllm.secure.homomorphic`. Reading is strict, as in `fedllm.wire.replies`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedllm.errors import WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.wire.masks import (
    HiddenAnswer,
    arrays_of,
    numbered,
    question_about,
    read_label,
    read_question,
    write_trained,
)
from fedllm.wire.packets import list_field, packet_of, scalar_field
from fedllm.wire.replies import read_codes

_KEY_HOLDER, _DECRYPT, _SUMMED = "key-holder-", "decrypt-", "summed-"


@dataclass(frozen=True)
class KeyHolder:
    """The party that can decrypt a sum, and its public key."""

    name: str
    public_key: bytes


@dataclass(frozen=True, kw_only=True)
class Decrypting:
    """The question to decrypt one sum, of those who `answered`, by the client `key_holder`."""

    label: bytes
    key_holder: str
    answered: tuple[str, ...]
    content: bytes


def add_key_holders(content: RecordDict, holders: Iterable[KeyHolder]) -> None:
    """Add to a train request who can decrypt each of its sums, in their order."""
    for place, holder in enumerate(holders):
        content[f"{_KEY_HOLDER}{place}"] = arrays_of({holder.name: holder.public_key})


def read_key_holders(content: RecordDict, number: int) -> tuple[KeyHolder, ...]:
    """Return who can decrypt each of a request's sums, of which there are `number`.

    Raises:
        WireError: a sum has none, or more than one.
    """
    records = numbered(content.array_records, _KEY_HOLDER)
    if len(records) != number or any(len(record) != 1 for record in records):
        raise WireError("the request does not name one key holder for each secret sum")
    return tuple(KeyHolder(name, packet_of(array)) for record in records for name, array in record.items())


def write_encrypted(
    results: Sequence[ClientUpdate | ClientFailure], encrypted: Mapping[str, bytes]
) -> RecordDict:
    """Return the answer of a node: a ciphertext for each party, and of its clients only which trained."""
    content = write_trained(results)
    if encrypted:
        content["encrypted"] = arrays_of(encrypted)
    return content


def read_encrypted(content: RecordDict, parties: Collection[str], *, most: int) -> HiddenAnswer[bytes]:
    """Return the answer of a node with these parties; `most` clients were asked. No ciphertext is looked at.

    Raises:
        WireError: the answer is malformed, or of another party.
    """
    trained, failed = read_codes(content, most=most, encrypted=ArrayRecord)
    record = content.array_records.get("encrypted", ArrayRecord())
    if not set(record) <= set(parties) or bool(record) != bool(trained):
        raise WireError("an encrypted answer is of another party, or does not match who has trained")
    encrypted = {party: packet_of(array) for party, array in record.items()}
    return HiddenAnswer(trained=tuple(trained), failed=tuple(failed.values()), hidden=encrypted)


def write_decrypt(sums: Sequence[Decrypting], *, round_num: int, plan_digest: str) -> RecordDict:
    """Return the question to a node whose clients can decrypt these sums."""
    content = question_about([one.key_holder for one in sums], round_num, plan_digest, is_over=False)
    for place, one in enumerate(sums):
        content[f"{_DECRYPT}{place}"] = ConfigRecord({"label": one.label, "answered": list(one.answered)})
        content[f"{_SUMMED}{place}"] = arrays_of({one.key_holder: one.content})
    return content


def read_decrypt(content: RecordDict, plan_digest: str) -> tuple[int, tuple[Decrypting, ...]]:
    """Return the round, and the sums that a question asks to decrypt; none where it says the run is over.

    Raises:
        OtherConfigError: it is of another run than this plan's.
        WireError: a field is missing or of the wrong kind, or a sum has not one ciphertext.
    """
    is_over = read_question(content, plan_digest)
    records = numbered(content.config_records, _DECRYPT)
    summed = numbered(content.array_records, _SUMMED)
    if len(records) != len(summed) or any(len(record) != 1 for record in summed):
        raise WireError("the question has not one encrypted sum for each key holder")
    if is_over == bool(records):
        raise WireError("a question opens sums, or says that the run is over")
    sums = tuple(
        Decrypting(
            label=read_label(record),
            key_holder=name,
            answered=tuple(list_field(record, "answered", str)),
            content=packet_of(array),
        )
        for record, arrays in zip(records, summed, strict=True)
        for name, array in arrays.items()
    )
    return scalar_field(content.config_records["request"], "round", int), sums
