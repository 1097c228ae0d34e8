"""Server optimizers: a round's change is a pseudo-gradient, and the server takes a step along it.

With Delta = target - start, momentum beta, second moment beta2, adaptivity tau and learning rate eta:

    fedavg      start + eta Delta
    fedavgm     m = beta m + Delta                     start + eta m                (arXiv 1909.06335)
    nesterov    m = beta m + Delta                     start + eta (Delta + beta m) (DiLoCo, arXiv 2311.08105)
    fedadam     m = beta m + (1 - beta) Delta          start + eta m / (sqrt(v) + tau)  (arXiv 2003.00295)
                v = beta2 v + (1 - beta2) Delta^2
    fedyogi     v = v - (1 - beta2) Delta^2 sign(v - Delta^2), the rest as fedadam
    fedadagrad  v = v + Delta^2, the rest as fedadam

Moments start at m = 0 and v = tau^2 and are not corrected for bias, as published. tau belongs to the size of
an adapter's change, some 1e-4 to 1e-2 a value; the published 1e-3 would make the adaptive rules near linear.
Tensor suffixes: P flat adapter.
"""

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.shapes import put_factors, shape_groups, stack_factors
from fedllm.plan.aggregation import ServerOptimizer
from fedllm.runs.records import OptimizerState


def step(
    optimizer: ServerOptimizer, state: OptimizerState, delta_P: torch.Tensor, trained_P: torch.Tensor
) -> tuple[OptimizerState, torch.Tensor]:
    """Return the next state and the step [P] along a pseudo-gradient; both are float32.

    Where `trained_P` is false no client trained: there nothing moves and the moments stay as they are, so
    that a factor which is frozen this round is frozen for momentum too.
    """
    first_P, second_P = state.first, state.second
    if state.num_steps == 0:
        first_P = torch.zeros_like(delta_P)
        second_P = torch.full_like(delta_P, optimizer.adaptivity**2)
    moved_first, moved_second, step_P = _moments_and_direction(optimizer, first_P, second_P, delta_P)
    after = OptimizerState(
        torch.where(trained_P, moved_first, first_P).float(),
        torch.where(trained_P, moved_second, second_P).float(),
        state.num_steps + 1,
    )
    return after, torch.where(trained_P, optimizer.rate * step_P, 0.0).float()


def _moments_and_direction(
    optimizer: ServerOptimizer, first_P: torch.Tensor, second_P: torch.Tensor, delta_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return both moments after a step, and its direction before the learning rate."""
    beta, square_P = optimizer.momentum, delta_P.square()
    if optimizer.name == "fedavg":
        return first_P, second_P, delta_P
    if optimizer.name in ("fedavgm", "nesterov"):
        first_P = beta * first_P + delta_P
        ahead_P = delta_P + beta * first_P
        return first_P, second_P, ahead_P if optimizer.name == "nesterov" else first_P
    first_P = beta * first_P + (1 - beta) * delta_P
    share = 1 - optimizer.second_moment
    if optimizer.name == "fedadam":
        second_P = optimizer.second_moment * second_P + share * square_P
    elif optimizer.name == "fedyogi":
        second_P = second_P - share * square_P * torch.sign(second_P - square_P)
    else:  # fedadagrad
        second_P = second_P + square_P
    return first_P, second_P, first_P / (second_P.sqrt() + optimizer.adaptivity)


# Singular values of T below this share of the largest are raised to it: B may grow tenfold, not without end.
LEAST_SHARE = 0.1


def rewrite_in_basis(layout: AdapterLayout, read_out_P: torch.Tensor, start_P: torch.Tensor) -> torch.Tensor:
    """Return the adapter `read_out_P` in the basis of `start_P`, with the same products B A.

    B A does not fix B and A. This rewrites an SVD result in last round's basis, so that momentum adds like to
    like: with Q an orthonormal basis of the row space of A, the A' = T Q nearest to the start's A_0 has
    T = A_0 Q^T, and B' = B (A Q^T) T^-1. A read-out that changed nothing comes back as the start itself.

    A rotation alone (orthogonal T) would not do: in the first round it leaves the balanced A of an SVD a
    fraction of the length of the initial one, and momentum repeats that shrinking until the adapter changes
    its sign.
    """
    vector_P = torch.empty_like(read_out_P)
    for group in shape_groups(layout):
        a_LKRI, b_LOKR = stack_factors(layout, (read_out_P, start_P), group.indices)
        a_LRI, b_LOR, start_LRI = a_LKRI[:, 0], b_LOKR[:, :, 0], a_LKRI[:, 1]
        basis_LIR, corner_LRR = torch.linalg.qr(a_LRI.mT)  # A = corner^T basis^T, so basis^T is Q
        u_LRR, s_LR, v_LRR = torch.linalg.svd(start_LRI @ basis_LIR, full_matrices=False)  # of T
        longest_L1 = s_LR[:, :1]
        # T is inverted below; where the start has no A at all, T becomes a rotation.
        s_LR = torch.maximum(s_LR, torch.where(longest_L1 > 0, LEAST_SHARE * longest_L1, 1.0))
        turn_LRR = (u_LRR * s_LR[:, None, :]) @ v_LRR
        back_LRR = (v_LRR.mT / s_LR[:, None, :]) @ u_LRR.mT
        b_LOR = b_LOR @ corner_LRR.mT @ back_LRR
        put_factors(layout, vector_P, group.indices, turn_LRR @ basis_LIR.mT, b_LOR)
    return vector_P
