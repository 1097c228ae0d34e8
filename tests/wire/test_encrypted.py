"""Records of encrypted sums come back as they were, or are refused by field."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedllm.errors import OtherConfigError, WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.wire import encrypted, masks, packets

HOLDERS = (encrypted.KeyHolder("ben", b"key of ben"), encrypted.KeyHolder("zoe", b"key of zoe"))
UPDATE = ClientUpdate(
    client_id="anna", round_num=1, rank=1, delta=torch.zeros(2), weight=1, num_tokens=3, train_loss=0.0
)
RESULTS = [UPDATE, ClientFailure(client_id="dora", code="no-data")]
DECRYPTING = encrypted.Decrypting(
    label=bytes(range(32)), key_holder="ben", answered=("anna", "ben"), content=b"sum"
)


def request() -> RecordDict:
    content = RecordDict({"request": ConfigRecord({"round": 1})})
    encrypted.add_key_holders(content, HOLDERS)
    return content


def answer() -> RecordDict:
    return encrypted.write_encrypted(RESULTS, {"anna": b"ciphertext"})


def question() -> RecordDict:
    return encrypted.write_decrypt([DECRYPTING], round_num=2, plan_digest="d")


READERS: dict[str, Callable[[RecordDict], Any]] = {
    "request": lambda content: encrypted.read_key_holders(content, 2),
    "answer": lambda content: encrypted.read_encrypted(content, ["anna", "ben"], most=2),
    "question": lambda content: encrypted.read_decrypt(content, "d"),
}
WRITERS = {"request": request, "answer": answer, "question": question}


def travelled(kind: str) -> Any:
    return READERS[kind](recorddict_from_proto(recorddict_to_proto(WRITERS[kind]())))


def test_each_message_comes_back_as_it_was() -> None:
    assert travelled("request") == HOLDERS
    assert travelled("question") == (2, (DECRYPTING,))
    got = travelled("answer")
    assert (got.trained, [one.code for one in got.failed]) == (("anna",), ["no-data"])
    assert got.hidden == {"anna": b"ciphertext"}
    assert not answer().metric_records


def test_the_end_of_a_run_asks_for_no_sum() -> None:
    over = masks.write_over(round_num=2, plan_digest="d")
    assert READERS["question"](over) == (2, ())
    with pytest.raises(OtherConfigError):
        encrypted.read_decrypt(over, "e")


@pytest.mark.parametrize(
    ("kind", "record", "name", "value"),
    [
        ("request", "key-holder-0", "eve", packets.to_array(b"key")),
        ("request", "key-holder-2", "eve", packets.to_array(b"key")),
        ("answer", "clients", "codes", ["ok", "ok, and his name is"]),
        ("answer", "clients", "codes", ["no-data", "no-data"]),
        ("answer", "encrypted", "eve", packets.to_array(b"ciphertext")),
        ("answer", "metrics", "weight", 3.0),
        ("answer", "free", "text", "Ada's row"),
        ("question", "request", "over", True),
        ("question", "decrypt-0", "label", bytes(31)),
        ("question", "decrypt-0", "answered", [1]),
        ("question", "summed-0", "eve", packets.to_array(b"sum")),
        ("question", "summed-1", "eve", packets.to_array(b"sum")),
    ],
)
def test_any_other_form_is_refused(kind: str, record: str, name: str, value: Any) -> None:
    content = WRITERS[kind]()
    if record not in content:
        kinds = {"metrics": MetricRecord, "free": ConfigRecord}
        content[record] = kinds.get(record, ArrayRecord)()
    content[record][name] = value
    with pytest.raises(WireError):
        READERS[kind](content)
