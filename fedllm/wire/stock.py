"""Named PEFT tensors, one array each: the form in which stock Flower strategies average an adapter."""

from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.errors import WireError


def write_plain(state: AdapterState) -> ArrayRecord:
    """Return named PEFT tensors in float32, one array each, as stock Flower strategies average them."""
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.tensors().items()})


def write_plain_update(after: AdapterState, num_examples: int, loss: float) -> RecordDict:
    """Return a node's answer to a stock strategy that had it train: its new adapter and two numbers."""
    metrics = MetricRecord({"num-examples": num_examples, "train-loss": loss})
    return RecordDict({"arrays": write_plain(after), "metrics": metrics})


def write_plain_evaluation(num_examples: int, loss: float) -> RecordDict:
    """Return a node's answer to a stock strategy that had it evaluate: two numbers."""
    return RecordDict({"metrics": MetricRecord({"num-examples": num_examples, "eval-loss": loss})})


def read_plain(record: ArrayRecord, layout: AdapterLayout) -> AdapterState:
    """Return the adapter in named tensors.

    Raises:
        WireError: a name is missing, renamed or extra, or a shape or dtype differs from the layout.
    """
    expected = {spec.name: spec for spec in layout.tensors}
    strange = next(iter(expected.keys() ^ set(record)), None)
    if strange is not None:
        word = "missing" if strange in expected else "unexpected"
        raise WireError(f"{word} tensor {strange[:120]!r}")
    vector = torch.empty(layout.size)  # every value is written: the names are exactly the layout's
    for spec, view in layout.views(vector):
        values = _numpy_of(record[spec.name], spec.name)
        # Flower's adaptive strategies (FedAdam and the like) answer in float64.
        if values.dtype not in (np.float32, np.float64) or values.shape != spec.shape:
            found = f"{values.dtype} {values.shape}"[:80]  # the dtype is text from outside
            raise WireError(f"tensor {spec.name!r} is {found}, expected float32 {spec.shape}")
        view.copy_(torch.from_numpy(values.astype(np.float32)))
    return AdapterState(layout, vector).checked_finite()


def _numpy_of(array: Array, name: str) -> "np.ndarray[Any, Any]":
    """Return the values that an array's bytes hold; the dtype and shape it declares are not trusted."""
    if array.data.startswith(b"\x93NUMPY"):  # numpy.load would open zip files too
        try:
            return array.numpy()
        except (TypeError, ValueError, EOFError, SyntaxError, TokenError):
            pass
    raise WireError(f"tensor {name!r} is not a NumPy array")
