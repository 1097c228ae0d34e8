"""One gauge for the rounds of a server optimizer.

B A = (B T^-1)(T A) for every invertible T, so the difference of two adapters means nothing until both are
written alike. A read-out by SVD comes in its own gauge every round. Before momentum may compare it with the
start, it is written with the A nearest to the start's that its row space allows; its product stays.
Tensor suffixes: P flat adapter, L matrices of one shape, R rank, O output feature, I input feature.
"""

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.shapes import put_factors, shape_groups, stack_factors

# Singular values of T below this share of the largest are raised to it: B may grow tenfold, not without end.
LEAST_SHARE = 0.1


def aligned(layout: AdapterLayout, read_out_P: torch.Tensor, start_P: torch.Tensor) -> torch.Tensor:
    """Return the adapter `read_out_P` in the gauge of `start_P`: every product B A is the same.

    With Q an orthonormal basis of the row space of A, the nearest A' = T Q to the start's A_0 has
    T = A_0 Q^T, and B' = B (A Q^T) T^-1. A read-out that changed nothing comes back as the start itself. A
    rotation alone (orthogonal T) cannot do this: in the first round it leaves the balanced A of an SVD a
    fraction of the length of the initial one, and momentum would repeat that shrinking until the adapter
    changes its sign.
    """
    vector_P = torch.empty_like(read_out_P)
    for group in shape_groups(layout):
        a_LKRI, b_LOKR = stack_factors(layout, (read_out_P, start_P), group.indices)
        a_LRI, b_LOR = _align(a_LKRI[:, 0], b_LOKR[:, :, 0], a_LKRI[:, 1])
        put_factors(layout, vector_P, group.indices, a_LRI, b_LOR)
    return vector_P


def _align(
    a_LRI: torch.Tensor, b_LOR: torch.Tensor, start_LRI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    basis_LIR, corner_LRR = torch.linalg.qr(a_LRI.mT)  # A = corner^T basis^T
    u_LRR, s_LR, v_LRR = torch.linalg.svd(start_LRI @ basis_LIR, full_matrices=False)
    longest_L1 = s_LR[:, :1]
    s_LR = torch.maximum(s_LR, torch.where(longest_L1 > 0, LEAST_SHARE * longest_L1, 1.0))
    turn_LRR = (u_LRR * s_LR[:, None, :]) @ v_LRR
    back_LRR = (v_LRR.mT / s_LR[:, None, :]) @ u_LRR.mT
    return turn_LRR @ basis_LIR.mT, b_LOR @ corner_LRR.mT @ back_LRR
