"""Dropout masks: their mean, whose they are, and that every way to draw them on a device gives the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.engine.dropout import Drops, NoisyRow, counted_mask, draws_as_a_cpu, drop_arrays, row_mask
from tests.builders import compile_kernels

ROWS = (NoisyRow(0, 3, 0.3, 2**62 + 5), NoisyRow(4, 6, 0.9, 7))


def drops_of(rows: tuple[NoisyRow, ...], num_tokens: int, device: str | torch.device = "cpu") -> Drops:
    """Return the drops of rows; what lies between them is kept."""
    arrays = drop_arrays(rows, num_tokens)
    positions_T = np.zeros(num_tokens, np.int64)
    for row in rows:
        positions_T[row.begin : row.end] = range(row.end - row.begin)
    values = (arrays["seeds_T"], positions_T, arrays["rates_T"])
    return Drops(*(torch.from_numpy(value).to(device) for value in values))


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 0.95), st.integers(0, 2**63 - 1), st.integers(0, 200), st.booleans())
def test_a_dropout_mask_keeps_the_mean(rate: float, seed: int, index: int, is_counted: bool) -> None:
    row, like = NoisyRow(0, 200, rate, seed), torch.empty(200, 300, dtype=torch.float64)

    def mask_at(index: int) -> torch.Tensor:
        if is_counted:
            return counted_mask(drops_of((row,), 200), index, like)
        return row_mask(row, index, like)

    mask = mask_at(index)
    assert abs(float(mask.mean()) - 1) < 6 * (rate / (1 - rate) / mask.numel()) ** 0.5
    torch.testing.assert_close(mask.unique(), torch.tensor([0.0, 1 / (1 - rate)]).double(), rtol=1e-5, atol=0)
    assert not torch.equal(mask, mask_at(index + 1))


def test_a_counted_mask_is_a_rows_own() -> None:
    together = counted_mask(drops_of(ROWS, 7), 3, torch.empty(7, 10))
    for row in ROWS:
        alone = NoisyRow(0, row.end - row.begin, row.rate, row.seed)
        expected = counted_mask(drops_of((alone,), alone.end), 3, torch.empty(alone.end, 10))
        assert torch.equal(together[row.begin : row.end], expected)
    assert bool((together[[3, 6]] == 1).all())  # of no row


def test_the_numbers_are_philox() -> None:
    """Its authors publish the words for a counter and a key of zeros: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    zero_T, like = torch.zeros(1, dtype=torch.int64), torch.empty(1, 4)
    for place, word in enumerate(words):
        for shift, is_kept in ((-1, True), (1, False)):
            rate = ((word >> 8) + shift) / 2**24
            mask = counted_mask(Drops(zero_T, zero_T, torch.tensor([rate])), 0, like)
            assert bool(mask[0, place] > 0) == is_kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_mask_is_the_plain_one(dtype: torch.dtype, kernel_device: torch.device) -> None:
    from fedllm.engine.triton.dropout import drop_mask

    drops = drops_of(ROWS, 7, kernel_device)
    for width in (3, 1030):
        like = torch.empty(7, width, dtype=dtype, device=kernel_device)
        found = drop_mask(drops.seeds_T, drops.positions_T, drops.rates_T, 5, like)
        assert torch.equal(found, counted_mask(drops, 5, like))
    assert draws_as_a_cpu(kernel_device)


def test_the_kernel_of_the_mask_compiles_for_a_gpu() -> None:
    pytest.importorskip("triton")
    drops = {"seeds": "*i64", "positions": "*i64", "rates": "*fp32", "scales": "*bf16"}
    other = {"masks": "*bf16", "width": "i32", "index": "i32", "BLOCK": 256}
    compile_kernels("fedllm.engine.triton.dropout", {"_drop_mask_kernel": {**drops, **other}})
