"""Lays rows of tokens end to end in one flat row, and computes the loss of every token that is learnt.

No token is padding, a prefix that rows share is computed once, and logits exist only where something is
learnt. `fedllm.models.attention` keeps the rows apart.
Suffixes: T token, Q sequence, K key, N supervised token, B row, G group of neighbours with one owner.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from fedllm.engine.head import Criterion, CrossEntropy, Head, head_loss
from fedllm.engine.pass_buffer import Array, PassBuffer
from fedllm.models.attention import is_ragged
from fedllm.models.chat import IGNORED, Encoded

SHORTEST_SHARED = 8  # tokens; less than that saves no more than its bookkeeping costs


@dataclass(frozen=True, eq=False)
class FlatRow:
    """Many rows laid end to end, on a device.

    Rows of one adapter that begin alike share their prefix. It is then a sequence of its own, and so is the
    rest of each row. The queries of a rest see the prefix's keys before their own.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor  # of each token in its row
    queries_Q: torch.Tensor  # [Q + 1] int32, where each sequence begins and the last ends
    keys_Q: torch.Tensor  # [Q + 1] int32, the same in the list of keys
    places_K: torch.Tensor | None  # where in T each key is; None where the keys are T itself
    longest: tuple[int, int]  # queries and keys of the longest sequence
    predicting_N: torch.Tensor  # where in T the prediction of each learnt token is made
    targets_N: torch.Tensor  # the learnt tokens
    learnt_B: torch.Tensor  # [B + 1], where in N each row's learnt tokens begin and the last ones end

    def attention_inputs(self) -> dict[str, Any]:
        """Return what `fedllm.models.attention.ragged_attention` must know of the row, by its names."""
        return {
            "cu_seq_lens_q": self.queries_Q,
            "cu_seq_lens_k": self.keys_Q,
            "max_length_q": self.longest[0],
            "max_length_k": self.longest[1],
            "key_places": self.places_K,
        }


@dataclass(frozen=True, eq=False)
class Arrangement:
    """What becomes a `FlatRow` on a device; `arrays` are its tensors, by name."""

    arrays: dict[str, Array]
    longest: tuple[int, int]
    lengths_G: Array  # tokens of each group
    begins_B: Array  # where in T the tokens begin that a row does not share


def lay_out(rows: Sequence[Encoded], device: torch.device, owners: Sequence[Hashable] = ()) -> FlatRow:
    """Return `arrange`d rows on a device."""
    arranged = arrange(rows, owners)
    return flat_row(PassBuffer(arranged.arrays, device).tensors, arranged.longest)


def flat_row(tensors: Mapping[str, torch.Tensor], longest: tuple[int, int]) -> FlatRow:
    """Return the flat row that consists of an arrangement's arrays, as tensors."""
    return FlatRow(
        **{name: tensors.get(name) for name in FlatRow.__annotations__ if name != "longest"},  # type: ignore[arg-type]
        longest=longest,
    )


def arrange(rows: Sequence[Encoded], owners: Sequence[Hashable] = ()) -> Arrangement:
    """Arrange rows end to end. A row's first token has nothing before it to be predicted from.

    Neighbours of one owner share what all of them begin with; without `owners` every row stands alone.
    """
    order = range(len(rows))
    groups = [[rows[place] for place in run] for _, run in groupby(order, (owners or order).__getitem__)]
    pieces: list[Array] = []
    sequences: list[tuple[int, int, int]] = []  # (queries, shared keys before their own, where those begin)
    shared_B, prefix_B, begins_B, lengths_G = [], [], [], []
    begin = 0
    for group in groups:
        shared, prefix = shared_prefix(group), begin
        if shared:
            pieces.append(group[0].arrays[0, :shared])
            sequences.append((shared, 0, prefix))
            begin += shared
        for row in group:
            pieces.append(row.arrays[0, shared:])
            sequences.append((len(row.tokens) - shared, shared, prefix))
            shared_B.append(shared)
            prefix_B.append(prefix)
            begins_B.append(begin)
            begin += len(row.tokens) - shared
        lengths_G.append(begin - prefix)
    queries_Q, before_Q, prefix_Q = np.array(sequences).T
    begins_Q, keys_Q = starts(queries_Q), queries_Q + before_Q
    arrays = {
        "tokens_T": np.concatenate(pieces),
        "positions_T": np.arange(begin) - (begins_Q - before_Q).repeat(queries_Q),
        "queries_Q": _bounds(queries_Q).astype(np.int32),
        "keys_Q": _bounds(keys_Q).astype(np.int32),
    }
    if before_Q.any():
        place_K = np.arange(keys_Q.sum()) - starts(keys_Q).repeat(keys_Q)  # in its sequence
        in_prefix_K = place_K < before_Q.repeat(keys_Q)
        starts_K = np.where(in_prefix_K, prefix_Q.repeat(keys_Q), (begins_Q - before_Q).repeat(keys_Q))
        arrays["places_K"] = starts_K + place_K
    learnt = _learnt(rows, np.array(shared_B), np.array(prefix_B), np.array(begins_B))
    longest = int(queries_Q.max()), int(keys_Q.max())
    return Arrangement(arrays | learnt, longest, np.array(lengths_G), np.array(begins_B))


def _learnt(rows: Sequence[Encoded], shared_B: Array, prefix_B: Array, begins_B: Array) -> dict[str, Array]:
    """Return where in T every learnt token is predicted, the tokens, and where in N each row's begin."""
    lengths_B = np.array([len(row.tokens) for row in rows])
    labels = np.concatenate([row.arrays[1] for row in rows])
    is_learnt = labels != IGNORED
    is_learnt[starts(lengths_B)] = False  # nothing is before a first token
    (places_N,) = is_learnt.nonzero()
    row_N = np.arange(len(rows)).repeat(lengths_B)[places_N]
    before_N = places_N - starts(lengths_B)[row_N] - 1  # the place in its row where it is predicted
    begin_N = np.where(before_N < shared_B[row_N], prefix_B[row_N], (begins_B - shared_B)[row_N])
    counts_B = np.bincount(row_N, minlength=len(rows))
    return {"predicting_N": begin_N + before_N, "targets_N": labels[places_N], "learnt_B": _bounds(counts_B)}


def _bounds(sizes: Array) -> Array:
    """Return where each of neighbours begins, and where the last one ends."""
    return np.concatenate([[0], sizes.cumsum()])


def starts(sizes: Array) -> Array:
    """Return where each of neighbours begins."""
    return sizes.cumsum() - sizes


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


def shared_prefix(rows: Sequence[Encoded]) -> int:
    """Return how many tokens rows of one owner share; each keeps one of its own, and few are not worth it."""
    if len(rows) < 2:
        return 0
    shared = min(len(row.tokens) for row in rows) - 1
    first = rows[0].arrays[0]
    for row in rows[1:]:
        differs = first[:shared] != row.arrays[0, :shared]
        shared = int(differs.argmax()) if differs.any() else shared
    return shared if shared >= SHORTEST_SHARED else 0
