"""What is known of one client whose update is in a secret sum: that it is there, or that it is lost."""

import torch

from fedllm.errors import SecureError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.runs.records import RoundPlan


def in_sum(client: str, plan: RoundPlan) -> ClientUpdate:
    """Return a client whose update is in a sum: what it sent says nothing by itself."""
    return ClientUpdate(
        client_id=client,
        round_num=plan.round_num,
        rank=plan.ranks[client],
        delta=torch.zeros(0),
        weight=0.0,
        num_tokens=0,
        train_loss=0.0,
    )


def not_opened(client: str, error: SecureError) -> ClientFailure:
    """Return a client whose update is lost with the sum that it is in."""
    return ClientFailure(client_id=client, code=error.code, reason=f"its secret sum is not opened: {error}")
