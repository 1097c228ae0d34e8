"""The plain form of an adapter that stock strategies use: named tensors, or a refusal."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.errors import NonFiniteError, WireError
from fedllm.wire import stock
from tests.builders import small_layout

LAYOUT = small_layout()
DELTA = torch.linspace(-1, 1, LAYOUT.size)


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
