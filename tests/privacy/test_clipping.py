"""Nothing that is clipped is longer than the clip, whatever it was."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedllm.privacy.noise import clipped, is_within, next_clip

anything = arrays("float64", array_shapes(max_dims=1, max_side=20), elements=st.floats(width=64))


@settings(deadline=None, max_examples=200)
@given(values=anything, clip=st.floats(1e-3, 1e3))
def test_what_is_clipped_is_finite_and_within_the_clip(values, clip: float) -> None:
    vector = torch.from_numpy(values.copy())
    found = clipped(vector, clip)
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())
    assert float(torch.linalg.vector_norm(found.double())) <= clip
    if not bool(torch.isfinite(vector).all()):
        assert not found.any()


@pytest.mark.parametrize("scale", [1e-3, 2.0, 1e30, 1e200])
def test_direction_is_kept(scale: float) -> None:
    vector = torch.tensor([3.0, -4.0], dtype=torch.float64)
    found = clipped(vector * scale, 1.0)
    expected = vector / 5 * min(1.0, 5 * scale)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_short_vectors_keep_their_bits_and_zero_stays_zero() -> None:
    vector = torch.tensor([0.1, -0.2, 0.3])
    assert torch.equal(clipped(vector, 1.0), vector)
    assert torch.equal(clipped(torch.zeros(4), 1.0), torch.zeros(4))


def test_a_clipped_update_counts_as_clipped_through_any_payload() -> None:
    vector = clipped(torch.randn(100, generator=torch.Generator().manual_seed(0)) * 9, 2.0)
    assert not is_within(vector, 2.0)
    assert not is_within(vector.bfloat16().float(), 2.0)
    assert is_within(0.9 * vector, 2.0)


def test_the_clip_moves_towards_the_median() -> None:
    assert next_clip(1.0, 0.5) == 1.0
    assert next_clip(1.0, 1.0) == pytest.approx(math.exp(-0.1))
    assert next_clip(1.0, 0.0) == pytest.approx(math.exp(0.1))


def test_the_clip_settles_at_the_median_of_the_norms() -> None:
    norms = torch.linspace(1.0, 9.0, 101)
    clip = 0.1
    for _ in range(300):
        clip = next_clip(clip, float((norms <= clip).double().mean()))
    assert clip == pytest.approx(5.0, rel=0.05)
