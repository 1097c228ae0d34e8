"""From rows of tokens to token losses: no padding, no prefix twice, logits only where something is learnt."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from operator import itemgetter
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fedllm.models.chat import IGNORED, Encoded
from fedllm.training.head import head_loss, precise

SHORTEST_SHARED = 8  # tokens; less than that saves no more than its bookkeeping costs


@dataclass(frozen=True, eq=False)
class FlatRow:
    """Many rows laid end to end. Suffixes: T tokens, Q sequences, K keys, N supervised tokens.

    Rows of one adapter that begin alike share their prefix. It is then a sequence of its own, and so is what
    follows it in each row, whose queries see the prefix's keys before their own.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor  # of each token in its row
    queries_Q: torch.Tensor  # [Q + 1] int32, where each sequence begins and the last ends
    keys_Q: torch.Tensor  # [Q + 1] int32, the same in the list of keys
    places_K: torch.Tensor | None  # where in T each key is; None where the keys are T itself
    longest: tuple[int, int]  # queries and keys of the longest sequence
    lengths: tuple[int, ...]  # tokens of each run of rows with one adapter
    predicting_N: torch.Tensor  # where in T the prediction of each learnt token is made
    targets_N: torch.Tensor  # the learnt tokens
    rows_N: torch.Tensor  # which row each of them is in


def lay_out(rows: Sequence[Encoded], device: torch.device, owners: Sequence[Hashable] = ()) -> FlatRow:
    """Return `rows` as one flat row. A row's first token has nothing before it to be predicted from.

    Neighbours of one owner share what all of them begin with; without `owners` every row stands alone.
    """
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[tuple[int, list[int]]] = []  # (number of queries, where the keys are)
    learnt: list[tuple[int, int, int]] = []  # (where it is predicted, token, row)
    lengths, number = [], 0
    for run in _runs(rows, owners):
        begin, shared = len(tokens), _shared_prefix(run)
        prefix = list(range(begin, begin + shared))
        if shared:
            tokens += run[0].tokens[:shared]
            positions += range(shared)
            sequences.append((shared, prefix))
        for row in run:
            own = list(range(len(tokens), len(tokens) + len(row.tokens) - shared))
            tokens += row.tokens[shared:]
            positions += range(shared, len(row.tokens))
            places = prefix + own
            sequences.append((len(own), places))
            learnt += [
                (places[index - 1], label, number)
                for index, label in enumerate(row.labels)
                if index and label != IGNORED
            ]
            number += 1
        lengths.append(len(tokens) - begin)
    keys = [place for _, places in sequences for place in places]
    predicting, targets, numbers = zip(*learnt, strict=True) if learnt else ((), (), ())

    def integers(values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    return FlatRow(
        integers(tokens),
        integers(positions),
        integers([0, *accumulate(size for size, _ in sequences)], torch.int32),
        integers([0, *accumulate(len(places) for _, places in sequences)], torch.int32),
        integers(keys) if len(keys) > len(tokens) else None,
        (max(size for size, _ in sequences), max(len(places) for _, places in sequences)),
        tuple(lengths),
        integers(predicting),
        integers(targets),
        integers(numbers),
    )


def _runs(rows: Sequence[Encoded], owners: Sequence[Hashable]) -> Iterator[list[Encoded]]:
    """Split rows into runs of neighbours of one owner."""
    for _, run in groupby(zip(owners or range(len(rows)), rows, strict=True), key=itemgetter(0)):
        yield [row for _, row in run]


def _shared_prefix(rows: Sequence[Encoded]) -> int:
    """Return how many tokens all rows begin with; each keeps one of its own, and few are not worth it."""
    if len(rows) < 2:
        return 0
    columns = zip(*(row.tokens[:-1] for row in rows), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return shared if shared >= SHORTEST_SHARED else 0


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
        "cu_seq_lens_q": flat.queries_Q,
        "cu_seq_lens_k": flat.keys_Q,
        "max_length_q": flat.longest[0],
        "max_length_k": flat.longest[1],
        "key_places": flat.places_K,
        "use_cache": False,
    }
    if through_head:
        head = model.get_output_embeddings()
        hidden_ND = model.get_decoder()(**inputs).last_hidden_state[0, flat.predicting_N]
        return head_loss(hidden_ND, head.weight, head.bias, flat.targets_N, weights_N)
    logits_NV = model(**inputs, logits_to_keep=flat.predicting_N).logits[0]
    losses_N = cross_entropy(logits_NV.to(precise(logits_NV.dtype)), flat.targets_N, reduction="none")
    return (losses_N * weights_N).sum(), losses_N.detach()
