"""The kernel of the clipped sum is the product of matrices, but for gradients that count as nothing."""

import pytest
import torch

from fedllm.engine.example_gradients import sums_as_a_cpu
from tests.builders import compile_kernels


@pytest.mark.parametrize("size", [3, 1100])
def test_the_clipped_sum_is_the_product_of_matrices(size: int, kernel_device: torch.device) -> None:
    from fedllm.engine.triton.clipped_sum import add_clipped_sum

    draw = torch.Generator().manual_seed(size)
    factors, owners = torch.tensor([0.5, 0.0, 1.0, 0.25]), torch.tensor([0, 0, 2, 2])
    grads, totals = torch.randn(4, size, generator=draw), torch.randn(3, size, generator=draw)
    product = torch.zeros(3, 4).index_put_((owners, torch.arange(4)), factors) @ grads
    wide = torch.full((3, size + 5), torch.nan, device=kernel_device)
    wide[:, :size] = totals
    grads[1] = torch.nan  # counts as nothing
    add_clipped_sum(
        wide[:, :size], grads.to(kernel_device), factors.to(kernel_device), owners.to(kernel_device)
    )
    torch.testing.assert_close(wide[:, :size].cpu(), totals + product, rtol=1e-6, atol=1e-6)
    assert wide[:, size:].isnan().all()


def test_the_clipped_sum_keeps_jobs_apart(kernel_device: torch.device) -> None:
    from fedllm.engine.triton.clipped_sum import add_clipped_sum

    grads = torch.tensor([[torch.nan, 1.0], [2.0, 3.0]], device=kernel_device)
    totals = torch.zeros(2, 2, device=kernel_device)
    factors = torch.tensor([torch.nan, 1.0], device=kernel_device)
    add_clipped_sum(totals, grads, factors, torch.arange(2, device=kernel_device))
    assert totals[0].isnan().all()  # a job that diverges as a whole still shows
    assert totals[1].tolist() == [2.0, 3.0]


def test_the_clipped_sum_stands_its_trial(kernel_device: torch.device) -> None:
    assert sums_as_a_cpu(kernel_device)


def test_the_clipped_sum_compiles_for_a_gpu() -> None:
    pytest.importorskip("triton")
    rows = {"grads": "*fp32", "grad_stride": "i32", "factors": "*fp32", "owners": "*i64", "slots": "i32"}
    sums = {"totals": "*fp32", "total_stride": "i32", "size": "i32", "BLOCK": 1024}
    compile_kernels("fedllm.engine.triton.clipped_sum", {"_clipped_sum_kernel": {**rows, **sums}})
