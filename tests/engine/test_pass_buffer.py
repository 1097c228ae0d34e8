import numpy as np
import pytest
import torch

from fedllm.engine.pass_buffer import PassBuffer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_other_values_go_to_the_same_memory(device: str) -> None:
    first = {
        "a": np.array([1, 2, 3], np.int32),
        "none": np.zeros(0, np.int64),
        "b": np.array([0.5, -1.0], np.float64),
        "c": np.array([7, 8, 9, 10], np.int64),
    }
    buffer = PassBuffer(first, torch.device(device))
    views = buffer.tensors
    for name, array in first.items():
        assert torch.equal(views[name].cpu(), torch.from_numpy(array))
    buffer.write({name: array + 1 for name, array in first.items()})
    for name, array in first.items():
        assert views[name].dtype == torch.from_numpy(array).dtype
        assert torch.equal(views[name].cpu(), torch.from_numpy(array + 1))
