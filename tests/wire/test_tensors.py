"""Packets inside replies, and the plain form of an adapter that stock strategies use."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.errors import NonFiniteError, WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.wire import packets, replies, stock

LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), 2, 4.0, "f" * 64)
OTHER_RANK = AdapterLayout(LAYOUT.matrices, 1, 4.0, LAYOUT.fingerprint)
DELTA = torch.linspace(-1, 1, LAYOUT.size)
SECRET = "xyzzy-private"


def reply() -> RecordDict:
    updates = [
        ClientUpdate(
            client_id=name, round_num=4, rank=2, delta=DELTA, weight=1.0, num_tokens=3, train_loss=0.5
        )
        for name in ("a", "b")
    ]
    return replies.write_updates(updates, layout=LAYOUT, part="both", payload="fp32")


def read(content: RecordDict) -> list[ClientUpdate | ClientFailure]:
    return replies.read_updates(content, layout=LAYOUT, ranks={"a": 2, "b": 2}, part="both", round_num=4)


def packet(layout: AdapterLayout = LAYOUT, size: int | None = None, round_num: int = 4) -> bytes:
    vector = torch.zeros(size or layout.size)
    return packets.encode(vector, layout_digest=layout.digest, round_num=round_num, payload="fp32")


def as_array(data: bytes, **changes: Any) -> Array:
    values = {"dtype": "uint8", "shape": (len(data),), "stype": packets.PACKET_TYPE, "data": data}
    return Array(**{**values, **changes})


BAD_PACKETS = {
    "cut": as_array(packet()[:-1]),
    "empty": as_array(b""),
    "not a packet": as_array(SECRET.encode()),
    "earlier round": as_array(packet(round_num=3)),
    "other rank": as_array(packet(OTHER_RANK)),
    "other size": as_array(packet(size=LAYOUT.size + 1)),
    "oversized": as_array(packet(size=LAYOUT.size * 4)),
    "numpy array": Array(np.zeros(LAYOUT.size, "float32")),
    "other stype": as_array(packet(), stype=SECRET),
    "other dtype": as_array(packet(), dtype=SECRET),
}


@pytest.mark.parametrize("kind", BAD_PACKETS)
def test_a_bad_packet_fails_its_own_client_alone(kind: str) -> None:
    content = reply()
    content["updates"]["a"] = BAD_PACKETS[kind]
    bad, good = read(content)
    assert isinstance(bad, ClientFailure)
    assert (bad.client_id, bad.code) == ("a", "bad-packet")
    assert SECRET not in bad.reason
    assert "\n" not in bad.reason
    assert isinstance(good, ClientUpdate)
    assert torch.equal(good.delta, DELTA)


def _rename(content: RecordDict) -> None:
    content["updates"][SECRET] = content["updates"].pop("a")


def _drop(content: RecordDict) -> None:
    content["updates"].pop("a")


def _add(content: RecordDict) -> None:
    content["updates"][SECRET] = content["updates"]["a"]


def _drop_all(content: RecordDict) -> None:
    del content["updates"]


def _report_failure_with_a_packet(content: RecordDict) -> None:
    content["clients"]["codes"] = ["ok", "failed"]
    for column in content["metrics"].values():
        column.pop()


@pytest.mark.parametrize("damage", [_rename, _drop, _add, _drop_all, _report_failure_with_a_packet])
def test_packets_of_clients_without_an_update_are_refused(
    damage: Callable[[RecordDict], None],
) -> None:
    content = reply()
    damage(content)
    with pytest.raises(WireError) as caught:
        read(content)
    assert SECRET not in str(caught.value)


def test_plain_tensors_come_back_bit_for_bit_under_peft_names() -> None:
    state = AdapterState(LAYOUT, DELTA)
    record = stock.write_plain(state)
    assert list(record) == [spec.name for spec in LAYOUT.tensors]
    assert stock.read_plain(record, LAYOUT).digest == state.digest


FIRST = LAYOUT.tensors[0].name


def _without(record: ArrayRecord) -> None:
    record.pop(FIRST)


def _renamed(record: ArrayRecord) -> None:
    record[FIRST + ".default"] = record.pop(FIRST)


def _with_more(record: ArrayRecord) -> None:
    record["more"] = Array(np.zeros(1, "float32"))


def _replaced_by(array: np.ndarray) -> Callable[[ArrayRecord], None]:
    def damage(record: ArrayRecord) -> None:
        record[FIRST] = Array(array)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _without,
        _renamed,
        _with_more,
        _replaced_by(np.zeros((2, 3), "float16")),
        _replaced_by(np.zeros((2, 3), "int64")),
        _replaced_by(np.zeros((3, 2), "float32")),
        _replaced_by(np.zeros((1, 3), "float32")),
        _replaced_by(np.zeros(6, "float32")),
        _replaced_by(np.zeros((), "float32")),
    ],
)
def test_tensors_of_another_name_shape_or_dtype_are_refused(
    damage: Callable[[ArrayRecord], None],
) -> None:
    record = stock.write_plain(initial_adapter(LAYOUT, 0))
    damage(record)
    with pytest.raises(WireError):
        stock.read_plain(record, LAYOUT)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_plain_tensors_that_are_not_finite_are_refused(value: float) -> None:
    record = stock.write_plain(initial_adapter(LAYOUT, 0))
    record[FIRST] = Array(np.full((2, 3), value, "float32"))
    with pytest.raises(NonFiniteError):
        stock.read_plain(record, LAYOUT)


def npy(array: np.ndarray, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros((2, 3), "float32"))
    return stream.getvalue()


WHOLE = npy(np.zeros((2, 3), "float32"))


@pytest.mark.parametrize(
    ("data", "stype"),
    [
        (b"", "numpy.ndarray"),
        (b"not numpy", "numpy.ndarray"),
        (WHOLE[:8], "numpy.ndarray"),
        (WHOLE[:-1], "numpy.ndarray"),
        (WHOLE.replace(b"(2, 3)", b"((((((")[:-1], "numpy.ndarray"),
        (np.zeros((9, 9)).tobytes(), "numpy.ndarray"),
        (npz(), "numpy.ndarray"),
        (npy(np.array([[None] * 3] * 2), pickled=True), "numpy.ndarray"),
        (npy(np.zeros(3, "float32")), "numpy.ndarray"),  # would broadcast over the rows
        (npy(np.zeros((2, 3), "float16")), "numpy.ndarray"),
        (WHOLE, "pickle"),
    ],
)
def test_tensors_that_are_not_what_they_declare_are_refused(data: bytes, stype: str) -> None:
    record = stock.write_plain(initial_adapter(LAYOUT, 0))
    record[FIRST] = Array(dtype="float32", shape=(2, 3), stype=stype, data=data)
    with pytest.raises(WireError):
        stock.read_plain(record, LAYOUT)
