"""Secret sums as Flower records: the parties of a sum, masked answers, and the exchange that opens their sum.

    train request    one record for each sum that concerns the node, "secure-0", ...: label, parties, ranges
    masked answer    clients      ids and codes, as in any answer; no metrics: numbers are in the sum
                     masked       party -> its masked vector
                     boxes        party -> a box for every party, in their order
                     commitments  party -> a commitment to each box
    unmask question  request      round, plan, clients, whether the run is `over`, which ends all keys
                     unmask-0...  for each sum: label, its clients here, the parties that answered
                     boxes-0...   client -> the box that each party which answered made for it
                     commitments-0...  client -> the commitment to each of these
    its answer       clients      ids and codes
                     openings     client -> its shares

What the bytes mean is in `fedllm.secure.masking`. Reading is strict, as in `fedllm.wire.replies`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedllm.errors import OtherConfigError, WireError
from fedllm.identity import statement
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.plan.run_plan import RunPlan
from fedllm.privacy.distributed import SharedNoise
from fedllm.secure.additive import shared_bytes
from fedllm.secure.homomorphic import encrypted_bytes
from fedllm.secure.masking import Masked, sent_bytes
from fedllm.secure.parties import LABEL_BYTES, Exchange, Party, group_sizes
from fedllm.secure.vector import NUM_NUMBERS, Scale
from fedllm.wire.packets import list_field, packet_of, payload_bytes, scalar_field, to_array
from fedllm.wire.replies import read_codes, write_codes

T = TypeVar("T")
UNMASK = "query.unmask"  # the type of the message that opens sums
_SUM, _UNMASK, _BOXES, _COMMITMENTS = "secure-", "unmask-", "boxes-", "commitments-"
_MASKED = ("masked", "boxes", "commitments")


@dataclass(frozen=True, kw_only=True)
class AskedSum:
    """One secret sum of a round, as far as it concerns one node.

    `num_clients` are those of all parties together: more than parties where nodes sum first. No client weighs
    more than `weight_cap`, and no honest value of a delta is above `largest`; both fix what a word of the
    ring means. `clients` are this node's in the sum.
    """

    exchange: Exchange
    num_clients: int
    weight_cap: float
    largest: float
    clients: tuple[str, ...]

    def agreed(self, round_num: int, adapter: str, base_delta: str, clip: float) -> "AskedSum":
        """Return the sum with all terms in its exchange: masks of parties that were told others stay on.

        `adapter` and `base_delta` are the digests of what clients start from, `clip` that of the request.
        """
        terms = {
            "round": round_num,
            "adapter": adapter,
            "base-delta": base_delta,
            "numbers": [self.num_clients, self.weight_cap, self.largest, clip],
        }
        digest = hashlib.sha256(statement("fedllm secret sum terms 1", terms)).digest()
        return replace(self, exchange=replace(self.exchange, terms=digest))

    def scale(self, most_tokens: int, noise: SharedNoise | None = None) -> Scale:
        """Return what the words of this sum mean; no client learns from more than `most_tokens` tokens.

        Where parties add shares of `noise`, these have set the step of the delta.
        """
        return Scale(
            num_clients=self.num_clients,
            largest=self.largest,
            weight_cap=self.weight_cap,
            most_tokens=most_tokens,
            delta_step=noise.step if noise is not None else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class Unmasking:
    """The question that opens one sum: `boxes` and `commitments` are, by client of the node, those of all who
    `answered`, in their order.
    """

    label: bytes
    answered: tuple[str, ...]
    boxes: Mapping[str, Sequence[bytes]]
    commitments: Mapping[str, Sequence[bytes]]


@dataclass(frozen=True, kw_only=True)
class HiddenAnswer(Generic[T]):
    """What a node answers to a train request of a secret sum.

    `trained` are the clients that have an update in it, `failed` the others; `hidden` has by party the vector
    that it adds, in the form of the run's method.
    """

    trained: tuple[str, ...]
    failed: tuple[ClientFailure, ...]
    hidden: Mapping[str, T] = field(default_factory=dict)

    def members(self, clients: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return by party which of the clients that it speaks for are in its vector.

        Raises:
            WireError: a party has sent a vector, and none of its clients has trained.
        """
        found = {party: [one for one in clients[party] if one in self.trained] for party in self.hidden}
        if not all(found.values()):
            raise WireError("an answer has a vector of none of the clients that have trained")
        return found


def delta_bytes(plan: RunPlan, size: int) -> int:
    """Return the bytes in which a delta of `size` values travels, headers left out."""
    if plan.secure is None:
        return payload_bytes(size, plan.config.wire.codec)
    if plan.secure.method == "he":
        return encrypted_bytes(size + NUM_NUMBERS)
    if plan.secure.is_blind:
        return shared_bytes(size + NUM_NUMBERS)
    return sent_bytes(size + NUM_NUMBERS, group_sizes(plan.cohort.size)[0])


# --- the parties of a sum ----------------------------------------------------------------------------------


def add_sums(content: RecordDict, sums: Iterable[AskedSum]) -> None:
    """Add the secret sums that concern a node to a train request."""
    for place, asked in enumerate(sums):
        parties = asked.exchange.parties
        content[f"{_SUM}{place}"] = ConfigRecord(
            {
                "label": asked.exchange.label,
                "names": [party.name for party in parties],
                "keys": [party.run_key for party in parties],
                "identities": [party.identity for party in parties],
                "signatures": [party.signature for party in parties],
                "num-clients": asked.num_clients,
                "weight-cap": asked.weight_cap,
                "largest": asked.largest,
                "clients": list(asked.clients),
            }
        )


def read_sums(content: RecordDict) -> tuple[AskedSum, ...]:
    """Return the secret sums that a train request asks for, () where it asks for plain updates.

    Raises:
        WireError: a field is missing or of the wrong kind, or lists differ in length.
    """
    return tuple(_read_sum(record) for record in numbered(content.config_records, _SUM))


def _read_sum(record: ConfigRecord) -> AskedSum:
    columns: list[list[Any]] = [
        list_field(record, name, kind)
        for name, kind in (("names", str), ("keys", bytes), ("identities", str), ("signatures", bytes))
    ]
    if len({len(column) for column in columns}) != 1:
        raise WireError("the parties of a secret sum have not one key and signature each")
    parties = tuple(Party(*values) for values in zip(*columns, strict=True))
    clients, num_clients = list_field(record, "clients", str), scalar_field(record, "num-clients", int)
    weight_cap, largest = (scalar_field(record, name, float) for name in ("weight-cap", "largest"))
    if len(clients) != len(set(clients)) or num_clients < len(parties):
        raise WireError("a secret sum names a client twice, or has fewer clients than parties")
    if min(weight_cap, largest) <= 0:
        raise WireError("a secret sum has a range that is no number above 0")
    return AskedSum(
        exchange=Exchange(read_label(record), parties),
        num_clients=num_clients,
        weight_cap=weight_cap,
        largest=largest,
        clients=tuple(clients),
    )


# --- masked answers ----------------------------------------------------------------------------------------


def write_masked(results: Sequence[ClientUpdate | ClientFailure], masked: Mapping[str, Masked]) -> RecordDict:
    """Return the answer of a node: a masked vector for each party, and of its clients only which trained."""
    content = write_trained(results)
    if masked:
        content["masked"] = arrays_of({party: one.packed for party, one in masked.items()})
        content["boxes"] = arrays_of({party: b"".join(one.boxes) for party, one in masked.items()})
        content["commitments"] = arrays_of(
            {party: b"".join(one.commitments) for party, one in masked.items()}
        )
    return content


def write_trained(results: Sequence[ClientUpdate | ClientFailure]) -> RecordDict:
    """Return the part that answers by all methods have in common: which clients have trained."""
    failed = {result.client_id: result.code for result in results if isinstance(result, ClientFailure)}
    return write_codes(failed, [result.client_id for result in results])


def read_masked(content: RecordDict, exchanges: Mapping[str, Exchange], *, most: int) -> HiddenAnswer[Masked]:
    """Return the answer of a node with these parties, each in its exchange; `most` clients were asked.

    Of the masked vectors nothing is checked but that they are there: see `fedllm.secure.masking`.

    Raises:
        WireError: the answer is malformed, or of another party.
    """
    trained, failed = read_codes(content, most=most, **dict.fromkeys(_MASKED, ArrayRecord))
    packed, boxes, commitments = (content.array_records.get(name, ArrayRecord()) for name in _MASKED)
    parties = set(packed)
    if not parties <= exchanges.keys() or not set(boxes) == set(commitments) == parties:
        raise WireError("a masked answer is of another party, or without its boxes and commitments")
    if bool(parties) != bool(trained):
        raise WireError("a masked answer does not match the clients that have trained")
    masked = {}
    for party in parties:
        number = len(exchanges[party].parties)
        masked[party] = Masked(
            packet_of(packed[party]),
            _split(packet_of(boxes[party]), number),
            _split(packet_of(commitments[party]), number),
        )
    return HiddenAnswer(trained=tuple(trained), failed=tuple(failed.values()), hidden=masked)


# --- the exchange that opens a sum -------------------------------------------------------------------------


def write_unmask(unmaskings: Sequence[Unmasking], *, round_num: int, plan_digest: str) -> RecordDict:
    """Return the question to a node whose clients are in these sums."""
    clients = [client for one in unmaskings for client in one.boxes]
    content = question_about(clients, round_num, plan_digest, is_over=False)
    for place, one in enumerate(unmaskings):
        content[f"{_UNMASK}{place}"] = ConfigRecord(
            {"label": one.label, "clients": list(one.boxes), "answered": list(one.answered)}
        )
        content[f"{_BOXES}{place}"] = arrays_of(
            {client: b"".join(parts) for client, parts in one.boxes.items()}
        )
        content[f"{_COMMITMENTS}{place}"] = arrays_of(
            {client: b"".join(parts) for client, parts in one.commitments.items()}
        )
    return content


def write_over(*, round_num: int, plan_digest: str) -> RecordDict:
    """Return the message that a run's last sum is open, so that its keys need not be kept."""
    return question_about([], round_num, plan_digest, is_over=True)


def question_about(clients: list[str], round_num: int, plan_digest: str, *, is_over: bool) -> RecordDict:
    """Return the part that all questions of the second exchange have in common."""
    request: dict[str, Any] = {
        "round": round_num,
        "client-ids": clients,
        "plan": plan_digest,
        "over": is_over,
    }
    return RecordDict({"request": ConfigRecord(request)})


def read_question(content: RecordDict, plan_digest: str) -> bool:
    """Return whether a question of the second exchange says that the run is over.

    Raises:
        OtherConfigError: it is of another run than this plan's.
        WireError: a field is missing or of the wrong kind.
    """
    request = content.config_records.get("request", ConfigRecord())
    if scalar_field(request, "plan", str) != plan_digest:
        raise OtherConfigError("the question is of another run than this node was started for")
    return scalar_field(request, "over", bool)


def read_unmask(content: RecordDict, plan_digest: str) -> tuple[Unmasking, ...]:
    """Return the sums that a question asks to open; () where it says that the run is over.

    Raises:
        OtherConfigError: it is of another run than this plan's.
        WireError: a field is missing or of the wrong kind, or boxes do not match those who answered.
    """
    is_over = read_question(content, plan_digest)
    unmaskings = tuple(
        _read_unmasking(record, content, str(place))
        for place, record in enumerate(numbered(content.config_records, _UNMASK))
    )
    if is_over == bool(unmaskings):
        raise WireError("a question opens sums, or says that the run is over")
    return unmaskings


def _read_unmasking(record: ConfigRecord, content: RecordDict, place: str) -> Unmasking:
    clients, answered = (list_field(record, name, str) for name in ("clients", "answered"))
    boxes, commitments = (
        content.array_records.get(name + place, ArrayRecord()) for name in (_BOXES, _COMMITMENTS)
    )
    if not set(boxes) == set(commitments) == set(clients) or len(set(answered)) != len(answered):
        raise WireError("the boxes to open are not those of each client, or a party answered twice")
    parts = [
        {client: _split(packet_of(record[client]), len(answered)) for client in clients}
        for record in (boxes, commitments)
    ]
    return Unmasking(label=read_label(record), answered=tuple(answered), boxes=parts[0], commitments=parts[1])


def write_openings(openings: Mapping[str, bytes | ClientFailure]) -> RecordDict:
    """Return the answer to the question: the shares of each client that opens them."""
    failed = {client: one.code for client, one in openings.items() if isinstance(one, ClientFailure)}
    content = write_codes(failed, list(openings))
    if shares := {client: one for client, one in openings.items() if isinstance(one, bytes)}:
        content["openings"] = arrays_of(shares)
    return content


def read_openings(content: RecordDict, *, most: int) -> tuple[dict[str, bytes], dict[str, ClientFailure]]:
    """Return the shares that clients opened, unchecked, and the clients that opened none.

    Raises:
        WireError: the answer is malformed.
    """
    done, failed = read_codes(content, most=most, openings=ArrayRecord)
    shares = content.array_records.get("openings", ArrayRecord())
    if set(shares) != set(done):
        raise WireError("the opened shares do not match the clients that opened them")
    return {client: packet_of(shares[client]) for client in done}, failed


def numbered(records: Mapping[str, T], prefix: str) -> list[T]:
    """Return the records "PREFIX0", "PREFIX1", ... in their order.

    Raises:
        WireError: one is missing.
    """
    number = sum(name.startswith(prefix) for name in records)
    names = [f"{prefix}{place}" for place in range(number)]
    if not records.keys() >= set(names):
        raise WireError(f"the records {prefix}... are not numbered from 0")
    return [records[name] for name in names]


def read_label(record: ConfigRecord) -> bytes:
    """Return the label that a record names.

    Raises:
        WireError: it has none, or one of another length.
    """
    label = scalar_field(record, "label", bytes)
    if len(label) != LABEL_BYTES:
        raise WireError(f"the label of a secret sum has {len(label)} bytes, not {LABEL_BYTES}")
    return label


def arrays_of(parts: Mapping[str, bytes]) -> ArrayRecord:
    """Return bytes by name as arrays, which count as bytes of the run."""
    arrays: dict[str, Array] = {name: to_array(data) for name, data in parts.items()}
    return ArrayRecord(arrays)


def _split(data: bytes, number: int) -> tuple[bytes, ...]:
    """Return data as `number` parts of one length."""
    size, rest = divmod(len(data), number)
    if rest or not size:
        raise WireError("boxes or commitments are not of one length each")
    return tuple(data[begin : begin + size] for begin in range(0, len(data), size))
