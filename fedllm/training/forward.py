"""From rows of tokens to token losses: no padding, and logits only where something is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fedllm.models.chat import IGNORED, Encoded
from fedllm.training.head import head_loss, precise


@dataclass(frozen=True, eq=False)
class FlatRow:
    """Many rows laid end to end. Suffixes: T all tokens, B rows, N supervised tokens."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor  # from 0 in every row
    boundaries_B: torch.Tensor  # [B + 1] int32, where each row begins and the last ends
    longest: int  # tokens of the longest row
    predicting_N: torch.Tensor  # where in T the prediction of each learnt token is made
    targets_N: torch.Tensor  # the learnt tokens
    rows_N: torch.Tensor  # which row each of them is in


def lay_out(rows: Sequence[Encoded], device: torch.device) -> FlatRow:
    """Return `rows` as one flat row. A row's first token has nothing before it to be predicted from."""
    tokens = [token for row in rows for token in row.tokens]
    positions = [index for row in rows for index in range(len(row.tokens))]
    boundaries, predicting, targets, owners = [0], [], [], []
    for number, row in enumerate(rows):
        begin = boundaries[-1]
        for index, label in enumerate(row.labels):
            if index and label != IGNORED:
                predicting.append(begin + index - 1)
                targets.append(label)
                owners.append(number)
        boundaries.append(begin + len(row.tokens))
    return FlatRow(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(boundaries, device=device, dtype=torch.int32),
        max(len(row.tokens) for row in rows),
        torch.tensor(predicting, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(owners, device=device),
    )


def token_losses(
    model: Any, flat: FlatRow, weights_N: torch.Tensor, *, through_head: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of weights * losses, losses [N]) over the supervised tokens, in nats.

    `through_head` takes the hidden states and the frozen head apart (`fedllm.training.head`); otherwise the
    model's own forward makes the logits, for architectures that scale or cap them.
    """
    inputs = {
        "input_ids": flat.tokens_T[None],
        "position_ids": flat.positions_T[None],
        "cu_seq_lens_q": flat.boundaries_B,
        "cu_seq_lens_k": flat.boundaries_B,
        "max_length_q": flat.longest,
        "max_length_k": flat.longest,
        "use_cache": False,
    }
    if through_head:
        head = model.get_output_embeddings()
        hidden_ND = model.get_decoder()(**inputs).last_hidden_state[0, flat.predicting_N]
        return head_loss(hidden_ND, head.weight, head.bias, flat.targets_N, weights_N)
    logits_NV = model(**inputs, logits_to_keep=flat.predicting_N).logits[0]
    losses_N = cross_entropy(logits_NV.to(precise(logits_NV.dtype)), flat.targets_N, reduction="none")
    return (losses_N * weights_N).sum(), losses_N.detach()
