"""A loss through a frozen output head, a chunk of tokens at a time.

The head needs no gradient, so the gradient of the hidden states can be formed in the forward pass and the
logits thrown away: never more than those of one chunk exist. A criterion says what the loss of a token is:
here cross-entropy with the next token, in `fedllm.distillation` the divergence from a teacher.
Tensor suffixes: N supervised token, D feature, V vocabulary.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from fedllm.engine.device_trial import stands_trial

CHUNK = 256  # tokens whose logits exist at a time: 50 MB at a vocabulary of 49k
GPU_CHUNK = 2048  # as many as fill a GPU: 200 MB in bfloat16
GPU_LOGITS = 2**28  # at most, of large vocabularies


@dataclass(frozen=True, eq=False)
class Head:
    """A frozen output layer; without a weight the states are the logits already."""

    weight_VD: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None

    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Return new logits [..., V] of states [..., D], in the dtype that losses are computed in."""
        dtype = precise(states_ND.dtype)
        if self.weight_VD is None:
            return states_ND.to(dtype, copy=True)
        return self.products(states_ND).to(dtype)

    def products(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Return new logits [..., V] in the dtype of the weight, where there is one."""
        assert self.weight_VD is not None
        # Mamba adds its layers up in float32, whatever its weights are in.
        return linear(states_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)

    def backward(self, grad_NV: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the states [N, D] from that of the logits."""
        if self.weight_VD is None:
            return grad_NV
        return grad_NV.to(self.weight_VD.dtype) @ self.weight_VD


class Criterion(Protocol):
    """What the loss of every supervised token is, given the model's logits there."""

    def __call__(
        self, part: slice, logits_NV: torch.Tensor, wants_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the losses [n] of the tokens `part`, in nats, and where wanted their gradients [n, V].

        The logits are the criterion's to overwrite.
        """


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """-log p(target) of each token."""

    targets_N: torch.Tensor

    def __call__(
        self, part: slice, logits_NV: torch.Tensor, wants_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses and gradients; see `Criterion`."""
        # d/dlogits of logsumexp(logits) - logits[target] is softmax(logits) - onehot(target).
        log_norm = logits_NV.logsumexp(dim=1)
        target = self.targets_N[part, None]
        losses = log_norm - logits_NV.gather(1, target)[:, 0]
        if not wants_grad:
            return losses, None
        probabilities = logits_NV.sub_(log_norm[:, None]).exp_()
        return losses, probabilities.scatter_add_(1, target, torch.full_like(probabilities[:, :1], -1.0))


class HeadLoss(torch.autograd.Function):
    """(states [N, D], head) -> (weighted sum of losses, token losses [N]); only the states get a gradient."""

    @staticmethod
    def forward(
        ctx: Any, states_ND: torch.Tensor, head: Head, criterion: Criterion, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and every token's own, in nats; see the class."""
        wants_grad = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(states_ND) if wants_grad else None
        losses_N = torch.empty(len(weights_N), device=states_ND.device, dtype=precise(states_ND.dtype))
        chunk = _chunk(head, states_ND)
        for begin in range(0, len(weights_N), chunk):
            part = slice(begin, begin + chunk)
            weights = weights_N[part] if wants_grad else None
            if isinstance(criterion, CrossEntropy) and _is_fused(head, states_ND):
                found = _fused_chunk(head, criterion, part, states_ND[part], weights)
            else:
                found = _plain_chunk(head, criterion, part, states_ND[part], weights)
            losses_N[part], gradient = found
            if grad_ND is not None and gradient is not None:
                grad_ND[part] = gradient
        ctx.save_for_backward(grad_ND)  # already final but for the factor that the loss gets later
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the states."""
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_loss.to(grad_ND.dtype), None, None, None


def _chunk(head: Head, states_ND: torch.Tensor) -> int:
    """Return the number of tokens whose logits may exist at a time."""
    if states_ND.device.type != "cuda":
        return CHUNK
    vocabulary = states_ND.shape[1] if head.weight_VD is None else len(head.weight_VD)
    return max(CHUNK, min(GPU_CHUNK, GPU_LOGITS // vocabulary))


Chunk = tuple[torch.Tensor, torch.Tensor | None]  # losses, and where wanted their states' gradients


def _plain_chunk(
    head: Head, criterion: Criterion, part: slice, states_ND: torch.Tensor, weights_N: torch.Tensor | None
) -> Chunk:
    """Take the tokens `part`; weights are given where gradients are wanted."""
    losses_N, grad_NV = criterion(part, head.logits(states_ND), weights_N is not None)
    if grad_NV is None or weights_N is None:
        return losses_N, None
    return losses_N, head.backward(grad_NV.mul_(weights_N[:, None]))


def _fused_chunk(
    head: Head, criterion: CrossEntropy, part: slice, states_ND: torch.Tensor, weights_N: torch.Tensor | None
) -> Chunk:
    """Do what `_plain_chunk` does without a copy: the gradient overwrites the logits, in their own dtype."""
    from fedllm.engine.triton.cross_entropy import cross_entropy_

    logits_NV = head.products(states_ND)
    losses_N = cross_entropy_(logits_NV, criterion.targets_N[part], weights_N)
    return losses_N, None if weights_N is None else head.backward(logits_NV)


def _is_fused(head: Head, states_ND: torch.Tensor) -> bool:
    """Return whether the cross-entropy of these states is one kernel."""
    if head.weight_VD is None or precise(head.weight_VD.dtype) != torch.float32:
        return False
    return states_ND.device.type == "cuda" and _stands_trial(states_ND.device)


@lru_cache(maxsize=8)
def _stands_trial(device: torch.device) -> bool:
    def trial() -> bool:
        states_ND = torch.linspace(-1, 1, 6, device=device).view(2, 3)
        head = Head(torch.linspace(2, -1, 15, device=device).view(5, 3))
        criterion = CrossEntropy(torch.tensor([4, 1], device=device))
        given = (head, criterion, slice(0, 2), states_ND, states_ND[0, :2])
        (fused, fused_grad), (plain, plain_grad) = _fused_chunk(*given), _plain_chunk(*given)
        assert fused_grad is not None
        assert plain_grad is not None
        return torch.allclose(fused, plain) and torch.allclose(fused_grad, plain_grad, atol=1e-6)

    return stands_trial(device, "the cross-entropy", trial)


def head_loss(
    states_ND: torch.Tensor, head: Head, criterion: Criterion, weights_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of weights * losses, losses [N]) of states under a frozen head, in nats."""
    inputs = (states_ND, head, criterion, weights_N)
    loss, losses_N = HeadLoss.apply(*inputs)  # type: ignore[no-untyped-call]
    return loss, losses_N


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype losses are computed in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
