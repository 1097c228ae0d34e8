"""Secret sums by shares as Flower records, as far as they differ from `fedllm.wire.masks`.

    train request     holders        the parties that hold shares of the sum
    answer            clients        ids and codes, as in any answer; no metrics
                      share-0, -1... party -> its box for the holder at that place
    to a holder       request        round, plan, clients, whether the run is `over`
                      hold           label, the parties that answered
                      boxes          party -> its box for this holder
    its answer        clients, openings  the holder -> its sealed sum, and the key of it for each party
    to all parties    request, total label, the parties that answered
                      sums           holder -> what it has opened
    their answer      clients, openings  client -> the SHA-256 of its adapter
    to one party      request, publish
    its answer        clients, openings  client -> the values of its adapter, float32

What the bytes mean is in `fedllm.secure.additive`. Reading is strict, as in `fedllm.wire.replies`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedllm.errors import WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.secure.additive import NUM_HOLDERS
from fedllm.wire.masks import (
    HiddenAnswer,
    arrays_of,
    question_about,
    read_label,
    read_question,
    write_trained,
)
from fedllm.wire.packets import list_field, packet_of, scalar_field
from fedllm.wire.replies import read_codes

HOLD, TOTAL, PUBLISH = "hold", "total", "publish"
_SHARES = tuple(f"share-{place}" for place in range(NUM_HOLDERS))
_PARTS = {HOLD: "boxes", TOTAL: "sums"}


@dataclass(frozen=True, kw_only=True)
class RelayQuestion:
    """A question of the later exchanges: `kind` is HOLD, TOTAL or PUBLISH, "" where the run is over.

    `clients` are those that are asked; `parts` has a box for each party that `answered`, or the opened sum of
    each holder.
    """

    kind: str
    round_num: int
    clients: tuple[str, ...]
    label: bytes = b""
    answered: tuple[str, ...] = ()
    parts: Mapping[str, bytes] = field(default_factory=dict)


def add_holders(content: RecordDict, holders: Sequence[str]) -> None:
    """Add to a train request which parties hold shares of its sum."""
    content["holders"] = ConfigRecord({"names": list(holders)})


def read_holders(content: RecordDict) -> tuple[str, ...]:
    """Return which parties hold shares of a request's sum.

    Raises:
        WireError: it does not say.
    """
    return tuple(list_field(content.config_records.get("holders", ConfigRecord()), "names", str))


def write_shared(
    results: Sequence[ClientUpdate | ClientFailure], shared: Mapping[str, Sequence[bytes]]
) -> RecordDict:
    """Return the answer of a node: a box of each party for each holder, in their order."""
    content = write_trained(results)
    for place, name in enumerate(_SHARES if shared else ()):
        content[name] = arrays_of({party: boxes[place] for party, boxes in shared.items()})
    return content


def read_shared(
    content: RecordDict, parties: Collection[str], *, most: int
) -> HiddenAnswer[tuple[bytes, ...]]:
    """Return the answer of a node with these parties; `most` clients were asked. No box is opened.

    Raises:
        WireError: the answer is malformed, or of another party.
    """
    trained, failed = read_codes(content, most=most, **dict.fromkeys(_SHARES, ArrayRecord))
    records = [content.array_records.get(name, ArrayRecord()) for name in _SHARES]
    names = set(records[0])
    if not names <= set(parties) or any(set(one) != names for one in records) or bool(names) != bool(trained):
        raise WireError("an answer of shares is of another party, or has not a box for each holder")
    shared = {party: tuple(packet_of(one[party]) for one in records) for party in names}
    return HiddenAnswer(trained=tuple(trained), failed=tuple(failed.values()), hidden=shared)


def write_relay_question(asked: RelayQuestion, plan_digest: str) -> RecordDict:
    """Return a question of the later exchanges to one node."""
    content = question_about(list(asked.clients), asked.round_num, plan_digest, is_over=False)
    content[asked.kind] = ConfigRecord({"label": asked.label, "answered": list(asked.answered)})
    if asked.kind in _PARTS:
        content[_PARTS[asked.kind]] = arrays_of(asked.parts)
    return content


def read_relay_question(content: RecordDict, plan_digest: str) -> RelayQuestion:
    """Return a question of the later exchanges.

    Raises:
        OtherConfigError: it is of another run than this plan's.
        WireError: a field is missing or of the wrong kind, or it asks for two things.
    """
    is_over = read_question(content, plan_digest)
    kinds = [kind for kind in (HOLD, TOTAL, PUBLISH) if kind in content.config_records]
    if len(kinds) != (not is_over):
        raise WireError("a question opens a sum, or says that the run is over")
    request = content.config_records["request"]
    round_num = scalar_field(request, "round", int)
    if is_over:
        return RelayQuestion(kind="", round_num=round_num, clients=())
    clients = tuple(list_field(request, "client-ids", str))
    if kinds == [PUBLISH]:
        return RelayQuestion(kind=PUBLISH, round_num=round_num, clients=clients)
    (kind,) = kinds
    record = content.config_records[kind]
    parts = content.array_records.get(_PARTS[kind], ArrayRecord())
    answered = tuple(list_field(record, "answered", str))
    if len(set(answered)) != len(answered) or (kind == HOLD and set(parts) != set(answered)):
        raise WireError("the boxes to add up are not those of each party that answered")
    return RelayQuestion(
        kind=kind,
        round_num=round_num,
        clients=clients,
        label=read_label(record),
        answered=answered,
        parts={name: packet_of(array) for name, array in parts.items()},
    )
