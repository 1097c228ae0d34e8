"""A client's half of SCAFFOLD (`fedllm.engine.gradient_terms`): its own c_i, and how it changes.

c_i stays with the client. Its change travels as a second packet, in the codec of the round; the client adds
to its own what the server will read from that packet, so that c stays the mean of all c_i whatever the codec.
"""

from dataclasses import replace

import torch

from fedllm.engine.jobs import Job, Result
from fedllm.wire.packets import as_received


def corrected(job: Job, control_P: torch.Tensor, own_P: torch.Tensor) -> Job:
    """Return the job with gradients corrected by c - c_i."""
    return replace(job, correction=control_P - own_P)


def change_of(result: Result, own_P: torch.Tensor) -> torch.Tensor:
    """Return the change of c_i: from what it was to the mean of the round's gradients."""
    assert result.gradient is not None
    return result.gradient.float() - own_P


def changed(own_P: torch.Tensor, change_P: torch.Tensor, payload: str) -> torch.Tensor:
    """Return the new c_i: the change counts as the server reads it."""
    return own_P + as_received(change_P, payload)
