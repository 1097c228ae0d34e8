"""Records of sums by shares come back as they were, or are refused by field."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedllm.errors import OtherConfigError, WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.wire import masks, packets, shared

UPDATE = ClientUpdate(
    client_id="anna", round_num=1, rank=1, delta=torch.zeros(2), weight=1, num_tokens=3, train_loss=0.0
)
RESULTS = [UPDATE, ClientFailure(client_id="dora", code="no-data")]
BOXES = (b"vector", b"seed", b"other seed")
HOLD = shared.RelayQuestion(
    kind=shared.HOLD,
    round_num=2,
    clients=("ben",),
    label=bytes(range(32)),
    answered=("anna", "ben"),
    parts={"anna": b"one", "ben": b"two"},
)
TOTAL = replace(HOLD, kind=shared.TOTAL, parts={"cleo": b"sum"})
PUBLISH = shared.RelayQuestion(kind=shared.PUBLISH, round_num=2, clients=("ben",))


def travelled(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


def answer() -> RecordDict:
    return shared.write_shared(RESULTS, {"anna": BOXES})


def question() -> RecordDict:
    return shared.write_relay_question(HOLD, "d")


READERS: dict[str, Callable[[RecordDict], Any]] = {
    "answer": lambda content: shared.read_shared(content, ["anna", "ben"], most=2),
    "question": lambda content: shared.read_relay_question(content, "d"),
}


def test_holders_of_a_request_come_back() -> None:
    content = RecordDict({"request": ConfigRecord({"round": 1})})
    with pytest.raises(WireError):
        shared.read_holders(content)
    shared.add_holders(content, ("anna", "ben", "cleo"))
    assert shared.read_holders(travelled(content)) == ("anna", "ben", "cleo")


def test_an_answer_comes_back_and_tells_no_number() -> None:
    content = travelled(answer())
    got = READERS["answer"](content)
    assert (got.trained, [one.code for one in got.failed]) == (("anna",), ["no-data"])
    assert got.hidden == {"anna": BOXES}
    assert not content.metric_records


@pytest.mark.parametrize("asked", [HOLD, TOTAL, PUBLISH], ids=lambda asked: asked.kind)
def test_questions_come_back_as_they_were(asked: shared.RelayQuestion) -> None:
    assert READERS["question"](travelled(shared.write_relay_question(asked, "d"))) == asked
    with pytest.raises(OtherConfigError):
        shared.read_relay_question(shared.write_relay_question(asked, "d"), "e")


def test_the_end_of_a_run_asks_for_nothing() -> None:
    assert READERS["question"](masks.write_over(round_num=2, plan_digest="d")).kind == ""


@pytest.mark.parametrize(
    ("kind", "record", "name", "value"),
    [
        ("answer", "clients", "codes", ["ok", "ok, and his name is"]),
        ("answer", "clients", "codes", ["no-data", "no-data"]),
        ("answer", "share-1", "eve", packets.to_array(b"seed")),
        ("answer", "metrics", "weight", 3.0),
        ("answer", "free", "text", "Ada's row"),
        ("question", "request", "over", True),
        ("question", "hold", "label", bytes(31)),
        ("question", "hold", "answered", ["anna", "anna"]),
        ("question", "total", "answered", ["anna"]),
        ("question", "boxes", "eve", packets.to_array(b"box")),
    ],
)
def test_any_other_form_is_refused(kind: str, record: str, name: str, value: Any) -> None:
    content = {"answer": answer, "question": question}[kind]()
    if record not in content:
        kinds = {"metrics": MetricRecord, "share-1": ArrayRecord}
        content[record] = kinds.get(record, ConfigRecord)()
    content[record][name] = value
    with pytest.raises(WireError):
        READERS[kind](content)
