"""Cross-entropy in one kernel against torch's own."""

import pytest
import torch
from torch.nn.functional import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [5, 4096, 9001])
def test_losses_and_gradients_are_torchs(size: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    from fedllm.engine.triton.cross_entropy import cross_entropy_

    draw = torch.Generator().manual_seed(size)
    logits = (5 * torch.randn(4, size, generator=draw)).to(kernel_device, dtype)
    targets = torch.tensor([0, size - 1, size // 2, 1], device=kernel_device)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], device=kernel_device)
    exact = logits.double().requires_grad_()
    expected = cross_entropy(exact, targets, reduction="none")
    (expected * weights).sum().backward()
    untouched = logits.clone()
    losses = cross_entropy_(logits, targets, None)
    assert torch.equal(logits, untouched)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(cross_entropy_(logits, targets, weights), losses)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(logits.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_logits_that_cannot_be_have_no_gradient(kernel_device: torch.device) -> None:
    from fedllm.engine.triton.cross_entropy import cross_entropy_

    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0]], device=kernel_device)
    (loss,) = cross_entropy_(
        logits, torch.tensor([3], device=kernel_device), torch.ones(1, device=kernel_device)
    )
    assert float(loss) == pytest.approx(0.6931472)
    assert logits[0].tolist() == pytest.approx([0.0, 0.5, 0.0, -0.5])
