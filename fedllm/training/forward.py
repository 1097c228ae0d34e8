"""From rows of tokens to one loss: no padding, and logits only where something is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fedllm.models.chat import IGNORED, Encoded


@dataclass(frozen=True, eq=False)
class FlatRow:
    """Many rows laid end to end. Suffixes: T all tokens, N rows, S supervised tokens."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor  # from 0 in every row
    boundaries_N: torch.Tensor  # [N + 1] int32, where each row begins and the last ends
    predicting_S: torch.Tensor  # where in T the prediction of each learnt token is made
    targets_S: torch.Tensor  # the learnt tokens


def lay_out(rows: Sequence[Encoded], device: torch.device) -> FlatRow:
    """Return `rows` as one flat row. A row's first token has nothing before it to be predicted from."""
    tokens = [token for row in rows for token in row.tokens]
    positions = [index for row in rows for index in range(len(row.tokens))]
    boundaries, predicting, targets = [0], [], []
    for row in rows:
        begin = boundaries[-1]
        for index, label in enumerate(row.labels):
            if index and label != IGNORED:
                predicting.append(begin + index - 1)
                targets.append(label)
        boundaries.append(begin + len(row.tokens))
    return FlatRow(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(boundaries, device=device, dtype=torch.int32),
        torch.tensor(predicting, device=device),
        torch.tensor(targets, device=device),
    )


def summed_loss(model: Any, flat: FlatRow) -> torch.Tensor:
    """Return the cross-entropy summed over the supervised tokens of a flat row, in nats."""
    longest = int(flat.boundaries_N.diff().max())
    logits = model(
        input_ids=flat.tokens_T[None],
        position_ids=flat.positions_T[None],
        cu_seq_lens_q=flat.boundaries_N,
        cu_seq_lens_k=flat.boundaries_N,
        max_length_q=longest,
        max_length_k=longest,
        logits_to_keep=flat.predicting_S,
        use_cache=False,
    ).logits[0]
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(precise, flat.targets_S, reduction="sum")
