"""Records of secret sums come back as they were, or are refused by field."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedllm.errors import OtherConfigError, WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.secure.agreement import new_key, public_of
from fedllm.secure.masking import Masked, mask, opening
from fedllm.secure.parties import Exchange, Party
from fedllm.wire import masks, packets

NAMES = ("anna", "ben", "cleo")
PRIVATE = {name: new_key() for name in NAMES}
PARTIES = tuple(Party(name, public_of(PRIVATE[name]), "ed25519:x", bytes(64)) for name in NAMES)
EXCHANGE = Exchange(bytes(range(32)), PARTIES)
ASKED = masks.AskedSum(
    exchange=EXCHANGE, num_clients=4, weight_cap=30.0, largest=0.02, clients=("anna", "dora")
)
WORDS = np.arange(5, dtype=np.uint32)
MASKED = {name: mask(name, PRIVATE[name], EXCHANGE, WORDS, b"secret " * 5) for name in NAMES}
UPDATE = ClientUpdate(
    client_id="anna", round_num=1, rank=1, delta=torch.zeros(2), weight=1, num_tokens=3, train_loss=0.0
)
RESULTS = [UPDATE, ClientFailure(client_id="dora", code="no-data")]
UNMASKING = masks.Unmasking(
    label=EXCHANGE.label,
    answered=NAMES[:2],
    boxes={"anna": tuple(MASKED[name].boxes[0] for name in NAMES[:2])},
    commitments={"anna": tuple(MASKED[name].commitments[0] for name in NAMES[:2])},
)
OPENING = opening(
    "anna",
    PRIVATE["anna"],
    EXCHANGE,
    NAMES[:2],
    dict(zip(NAMES, UNMASKING.boxes["anna"], strict=False)),
    dict(zip(NAMES, UNMASKING.commitments["anna"], strict=False)),
)


def travelled(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


def request() -> RecordDict:
    content = RecordDict({"request": ConfigRecord({"round": 1})})
    masks.add_sums(content, [ASKED, ASKED])
    return content


def answer() -> RecordDict:
    return masks.write_masked(RESULTS, {"anna": MASKED["anna"]})


def question() -> RecordDict:
    return masks.write_unmask([UNMASKING], round_num=2, plan_digest="d")


def opened() -> RecordDict:
    failed = ClientFailure(client_id="ben", code="bad-mask")
    return masks.write_openings({"anna": OPENING, "ben": failed, "cleo": bytes(16)})


def test_the_sums_of_a_request_come_back_as_they_were() -> None:
    assert masks.read_sums(travelled(request())) == (ASKED, ASKED)
    assert masks.read_sums(RecordDict({"request": ConfigRecord({"round": 1})})) == ()


def test_a_masked_answer_comes_back_and_tells_no_number() -> None:
    content = travelled(answer())
    got = masks.read_masked(content, dict.fromkeys(NAMES, EXCHANGE), most=2)
    assert (got.trained, [one.code for one in got.failed]) == (("anna",), ["no-data"])
    assert got.hidden == {"anna": MASKED["anna"]}
    assert not content.metric_records
    boxes = 3 * (16 * 3 + 28 + 32)
    assert packets.packet_bytes(content) == 3 * len(WORDS) + boxes


def test_a_question_to_open_comes_back_as_it_was() -> None:
    assert masks.read_unmask(travelled(question()), "d") == (UNMASKING,)
    assert masks.read_unmask(travelled(masks.write_over(round_num=2, plan_digest="d")), "d") == ()
    with pytest.raises(OtherConfigError):
        masks.read_unmask(question(), "e")


def test_opened_shares_come_back_as_they_were() -> None:
    openings, failed = masks.read_openings(travelled(opened()), most=3)
    assert openings == {"anna": OPENING, "cleo": bytes(16)}
    assert {name: one.code for name, one in failed.items()} == {"ben": "bad-mask"}


CHANGES: dict[str, list[tuple[str, str, Any]]] = {
    "request": [
        ("secure-1", "label", bytes(31)),
        ("secure-1", "label", "a" * 32),
        ("secure-1", "keys", [bytes(32)]),
        ("secure-1", "names", [1, 2, 3]),
        ("secure-1", "clients", ["anna", "anna"]),
        ("secure-1", "weight-cap", float("inf")),
        ("secure-1", "num-clients", 2),
        ("secure-1", "weight-cap", 0.0),
        ("secure-1", "largest", float("nan")),
    ],
    "question": [
        ("request", "over", True),
        ("request", "over", 0),
        ("unmask-0", "answered", ["ben", "ben"]),
        ("unmask-0", "answered", ["anna", "ben", "cleo"]),
        ("unmask-0", "clients", ["anna", "cleo"]),
        ("unmask-0", "label", bytes(33)),
        ("boxes-0", "ben", packets.to_array(bytes(20))),
        ("commitments-0", "anna", packets.to_array(b"")),
    ],
    "answer": [
        ("clients", "codes", ["ok", "ok, and his name is"]),
        ("clients", "codes", ["no-data", "no-data"]),
        ("masked", "eve", packets.to_array(bytes(15))),
        ("boxes", "cleo", packets.to_array(bytes(15))),
        ("boxes", "anna", packets.to_array(bytes(16))),
        ("metrics", "weight", 3.0),
        ("free", "text", "Ada's row"),
    ],
    "opened": [
        ("clients", "ids", ["anna", "anna", "ben"]),
        ("openings", "ben", packets.to_array(bytes(16))),
        ("unopened", "ben", ["anna"]),
        ("metrics", "weight", 3.0),
    ],
}
READERS: dict[str, Callable[[RecordDict], Any]] = {
    "request": masks.read_sums,
    "question": lambda content: masks.read_unmask(content, "d"),
    "answer": lambda content: masks.read_masked(content, dict.fromkeys(NAMES, EXCHANGE), most=2),
    "opened": lambda content: masks.read_openings(content, most=3),
}


@pytest.mark.parametrize(
    ("kind", "record", "name", "value"),
    [(kind, *change) for kind, changes in CHANGES.items() for change in changes],
)
def test_any_other_form_is_refused(kind: str, record: str, name: str, value: Any) -> None:
    content = {"request": request, "question": question, "answer": answer, "opened": opened}[kind]()
    if record not in content:
        content[record] = MetricRecord() if record == "metrics" else ConfigRecord()
    content[record][name] = value
    with pytest.raises(WireError):
        READERS[kind](content)


def test_records_are_numbered_from_0() -> None:
    content = request()
    del content["secure-0"]
    with pytest.raises(WireError, match="not numbered"):
        masks.read_sums(content)


def test_an_answer_without_its_boxes_is_refused() -> None:
    for name in ("masked", "boxes", "commitments"):
        content = answer()
        content[name] = ArrayRecord()
        with pytest.raises(WireError):
            READERS["answer"](content)
    empty = Masked(b"", (b"", b"", b""), (b"", b"", b""))
    with pytest.raises(WireError):
        READERS["answer"](masks.write_masked(RESULTS, {"anna": empty}))
