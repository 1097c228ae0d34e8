"""Cross-entropy through a frozen output head, a chunk of tokens at a time.

The head needs no gradient, so the gradient of the hidden states can be formed in the forward pass and the
logits thrown away: never more than [CHUNK, V] of them exist. Tensor suffixes: N supervised token, D feature,
V vocabulary.
"""

from typing import Any

import torch
from torch.nn.functional import linear

CHUNK = 256  # tokens whose logits exist at a time: 50 MB at a vocabulary of 49k


class HeadLoss(torch.autograd.Function):
    """(hidden [N, D], head) -> (weighted sum of losses, token losses [N]); only hidden gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and every token's own, in nats; see the class."""
        wants_grad = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
        losses_N = torch.empty(len(targets_N), device=hidden_ND.device, dtype=precise(hidden_ND.dtype))
        for begin in range(0, len(targets_N), CHUNK):
            part = slice(begin, begin + CHUNK)
            logits = linear(hidden_ND[part], weight_VD, bias_V).to(losses_N.dtype)
            log_norm = logits.logsumexp(dim=1)
            target = targets_N[part, None]
            losses_N[part] = log_norm - logits.gather(1, target)[:, 0]
            if grad_ND is not None:
                probabilities = logits.sub_(log_norm[:, None]).exp_()
                probabilities.scatter_add_(1, target, torch.full_like(probabilities[:, :1], -1.0))
                probabilities.mul_(weights_N[part, None])
                grad_ND[part] = probabilities.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the hidden states."""
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_loss.to(grad_ND.dtype), None, None, None, None


def head_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of weights * losses, losses [N]) of hidden states under a frozen head, in nats."""
    inputs = (hidden_ND, weight_VD, bias_V, targets_N, weights_N)
    loss, losses_N = HeadLoss.apply(*inputs)  # type: ignore[no-untyped-call]
    return loss, losses_N


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype losses are computed in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
