"""Lays rows of tokens end to end in one flat row, and computes the loss of every token that is learnt.

No token is padding, a prefix that rows share is computed once, and logits exist only where something is
learnt. `fedllm.models.attention` keeps the rows apart.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from operator import itemgetter
from typing import Any

import torch

from fedllm.engine.head import Criterion, CrossEntropy, Head, head_loss
from fedllm.models.attention import is_ragged
from fedllm.models.chat import IGNORED, Encoded

SHORTEST_SHARED = 8  # tokens; less than that saves no more than its bookkeeping costs


@dataclass(frozen=True, eq=False)
class FlatRow:
    """Many rows laid end to end. Suffixes: T tokens, Q sequences, K keys, N supervised tokens.

    Rows of one adapter that begin alike share their prefix. It is then a sequence of its own, and so is the
    rest of each row. The queries of a rest see the prefix's keys before their own.
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

    def attention_inputs(self) -> dict[str, Any]:
        """Return what `fedllm.models.attention.ragged_attention` must know of the row, by its names."""
        return {
            "cu_seq_lens_q": self.queries_Q,
            "cu_seq_lens_k": self.keys_Q,
            "max_length_q": self.longest[0],
            "max_length_k": self.longest[1],
            "key_places": self.places_K,
        }


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


def token_losses(
    model: Any, flat: FlatRow, head: Head, weights_N: torch.Tensor, criterion: Criterion | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of weights * losses, losses [N]) over the supervised tokens, in nats.

    The loss of a token is what `criterion` says, the cross-entropy with it if there is none.
    """
    states_ND = predicting_states(model, flat, head)
    return head_loss(states_ND, head, criterion or CrossEntropy(flat.targets_N), weights_N)


def predicting_states(model: Any, flat: FlatRow, head: Head) -> torch.Tensor:
    """Return what the model has computed where each supervised token is predicted, [N, D].

    These are the hidden states, which `head` turns into logits. Where `head` has no weight they are already
    the logits, by the model's own forward: some architectures scale or cap them. A model without ragged
    attention is given one row at a time.
    """
    inputs: dict[str, Any] = {"input_ids": flat.tokens_T[None], "use_cache": False}
    if is_ragged(model):  # to one row alone they say nothing, and some layers take them for another's words
        inputs |= {"position_ids": flat.positions_T[None], **flat.attention_inputs()}
    if head.weight_VD is None:
        logits_NV: torch.Tensor = model(**inputs, logits_to_keep=flat.predicting_N).logits[0]
        return logits_NV
    hidden_TD: torch.Tensor = model.get_decoder()(**inputs).last_hidden_state[0]
    return hidden_TD[flat.predicting_N]


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
