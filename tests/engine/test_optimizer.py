import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.engine.optimizer import RowAdamW, largest_move
from fedllm.messages import LocalTraining


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    rate=st.floats(1e-5, 1.0),
    decay=st.floats(0, 0.5),
    clip=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
    steps=st.integers(1, 8),
)
def test_a_row_step_is_torchs_adamw_with_clipping(
    seed: int, rate: float, decay: float, clip: float, steps: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(12, generator=generator, dtype=torch.float64)
    parts = [part.clone().requires_grad_() for part in vector.split([5, 7])]
    theirs = torch.optim.AdamW(parts, lr=rate, weight_decay=decay)
    numbers = LocalTraining(steps=steps, batch_size=1, learning_rate=rate, weight_decay=decay, clip_norm=clip)
    rows = torch.stack([vector, vector])  # the second row rests from the first step on
    ours = RowAdamW(rows, [numbers, numbers])
    for _ in range(steps):
        grad = torch.randn(12, generator=generator, dtype=torch.float64)
        for part, gradient in zip(parts, grad.split([5, 7]), strict=True):
            part.grad = gradient.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(parts, clip)
        theirs.step()
        ours.step(grad.clone()[None])
    torch.testing.assert_close(rows[0], torch.cat(parts).detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(rows[1], vector), "a finished row does not move"


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    steps=st.integers(1, 40),
    decay=st.sampled_from([0.0, 0.1, 1.0]),
    pattern=st.sampled_from(["noise", "same", "last", "worst"]),
)
def test_no_gradients_move_a_value_further_than_the_bound(
    seed: int, steps: int, decay: float, pattern: str
) -> None:
    numbers = LocalTraining(steps=steps, batch_size=1, learning_rate=0.01, weight_decay=decay, clip_norm=0.0)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    theta = start.clone()
    optimizer = RowAdamW(theta, [numbers])
    for step in range(steps):
        size = {"noise": 1.0, "same": 1.0, "last": float(step == steps - 1), "worst": 0.9009**-step}[pattern]
        grad = (
            torch.randn(1, 6, generator=generator, dtype=torch.float64)
            if pattern == "noise"
            else -start.sign()
        )
        optimizer.step(size * grad)
    moved, bound = float((theta - start).abs().max()), largest_move(numbers, float(start.abs().max()))
    assert moved <= bound * (1 + 1e-9)


def test_the_bound_of_a_first_step_is_the_learning_rate() -> None:
    numbers = LocalTraining(steps=1, batch_size=1, learning_rate=0.02, weight_decay=0.0, clip_norm=1.0)
    assert largest_move(numbers, 5.0) == pytest.approx(0.02)
