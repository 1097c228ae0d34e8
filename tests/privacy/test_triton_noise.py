"""The kernels of private noise give the CPU's stream, hash and Gaussian values."""

import numpy as np
import pytest
import torch

from fedllm.privacy.keys import derived_key, keyed_hash
from fedllm.privacy.noise import SecretStream, gaussian
from tests.builders import compile_kernels

KEYS = tuple(derived_key(bytes(32), "kernel", row) for row in range(2))
STARTS = tuple(derived_key(bytes(32), "start", row)[:16] for row in range(2))


def words(values: tuple[bytes, ...], device: torch.device) -> torch.Tensor:
    """Return bytes of one length as rows of 32-bit words."""
    return torch.from_numpy(np.frombuffer(b"".join(values), "<i4").copy()).view(len(values), -1).to(device)


@pytest.mark.parametrize("size", [3, pytest.param(1025, marks=pytest.mark.soak)])
def test_the_kernels_stream_is_the_ciphers(size: int, kernel_device: torch.device) -> None:
    from fedllm.privacy.triton_noise import integers

    found = integers(words(KEYS, kernel_device), words(STARTS, kernel_device), size).cpu().numpy()
    for row, (key, start) in enumerate(zip(KEYS, STARTS, strict=True)):
        assert np.array_equal(found[row].view(np.uint64), SecretStream(key, start).integers(size))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1, torch.float32),
        pytest.param(1023, torch.float32, marks=pytest.mark.soak),
        pytest.param(1024, torch.float32, marks=pytest.mark.soak),
        (9, torch.float64),
    ],
)
def test_the_kernels_hash_is_the_cpus(size: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    from fedllm.privacy.triton_noise import keyed_hashes

    wide = torch.randn(2, size + 7, dtype=dtype, generator=torch.Generator().manual_seed(size))
    rows = wide.to(kernel_device)[:, :size]  # as the first values of longer rows
    found = keyed_hashes(words(KEYS, kernel_device), rows).cpu()
    assert torch.equal(found, words(tuple(map(keyed_hash, KEYS, wide[:, :size])), torch.device("cpu")))


@pytest.mark.parametrize("size", [1, pytest.param(1031, marks=pytest.mark.soak)])
def test_the_kernels_noise_is_the_cpus(size: int, kernel_device: torch.device) -> None:
    from fedllm.privacy.triton_noise import add_gaussian

    values = torch.full((2, size + 9), torch.nan, dtype=torch.float64, device=kernel_device)
    values[:, :size] = 0.0
    deviations = torch.tensor([1e-3, 2.5], dtype=torch.float64, device=kernel_device)
    add_gaussian(words(KEYS, kernel_device), words(STARTS, kernel_device), deviations, values[:, :size])
    for row, deviation in enumerate(deviations.tolist()):
        key = SecretStream(KEYS[row], STARTS[row]).integers(4).tobytes()
        expected = gaussian(SecretStream(key), size, deviation)
        # Logarithm, root, sine and two products: each within an ulp or two of the exact value.
        torch.testing.assert_close(values[row, :size].cpu(), expected, rtol=2e-15, atol=1e-16 * deviation)
    assert values[:, size:].isnan().all()


def test_the_kernels_of_noise_compile_for_a_gpu() -> None:
    pytest.importorskip("triton")
    row = {"stride": "i32", "size": "i32", "LANES": 128}
    keys = {"keys": "*i32", "firsts": "*i32"}
    compile_kernels(
        "fedllm.privacy.triton_noise",
        {
            "_stream_kernel": {**keys, "out": "*i64", "size": "i32", "LANES": 128},
            "_hash_kernel": {**keys, "words": "*i32", **row, "sums": "*i64"},
            "_gaussian_kernel": {**keys, "deviations": "*fp64", "values": "*fp32", **row},
        },
    )
