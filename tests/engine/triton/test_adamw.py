"""A step of AdamW over rows in one kernel against the plain one."""

from dataclasses import replace

import pytest
import torch

from fedllm.engine.row_step import RowStep, plain_adamw


@pytest.mark.parametrize("each", [False, True], ids=["keep a row", "keep a value"])
@pytest.mark.parametrize("size", [3, 2048, 2100])
def test_a_fused_step_is_the_plain_one(size: int, each: bool, kernel_device: torch.device) -> None:
    from fedllm.engine.triton.adamw import adamw_rows

    draw = torch.Generator().manual_seed(size)
    theta, grad, mean, square = torch.randn(4, 3, size, generator=draw)
    columns = [torch.rand(3, 1, generator=draw) for _ in range(2)]
    keep = torch.rand(3, size if each else 1, generator=draw)
    tensors = [tensor.to(kernel_device) for tensor in (theta, grad, mean, square.abs(), *columns, keep)]
    step = RowStep(*tensors, 0.1, 0.002)
    plain = replace(
        step,
        **{name: getattr(step, name).clone() for name in ("theta_AP", "grad_AP", "mean_AP", "square_AP")},
    )
    adamw_rows(step)
    plain_adamw(plain)
    for name in ("theta_AP", "mean_AP", "square_AP"):
        torch.testing.assert_close(getattr(step, name), getattr(plain, name), rtol=1e-5, atol=1e-6)
