"""What a pass reads: arrays on the host, the same as tensors on a device, and how they are padded.

Suffixes: T token, Q sequence, K key, N supervised token, B sample, G run of tokens of one client and slot.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from fedllm.engine.adapter_bank import Route, segments
from fedllm.engine.dropout import Drops, Noise, NoisyRow
from fedllm.engine.flat_row import FlatRow, flat_row, starts
from fedllm.engine.graphs import Sizes, num_padding
from fedllm.engine.pass_buffer import Array, PassBuffer
from fedllm.engine.route_tensors import most_tiles, route_arrays, route_tensors


@dataclass(frozen=True, eq=False)
class PassArrays:
    """A pass on the host. `flat` has the arrays of its flat row, and its tokens' weights and dropout."""

    flat: dict[str, Array]
    longest: tuple[int, int]
    lengths_G: Array  # tokens
    clients_G: Array
    slots_G: Array  # -1 is none
    num_slots: int
    noise: tuple[NoisyRow, ...] = ()
    num_tiles: int = 0  # at least

    def named(self) -> dict[str, Array]:
        """Return all arrays that a device needs."""
        route = route_arrays(self.lengths_G, self.clients_G, self.slots_G, self.num_slots, self.num_tiles)
        return {**self.flat, **route}

    @property
    def sizes(self) -> Sizes:
        """How much the pass holds."""
        flat = self.flat
        return Sizes(
            len(flat["tokens_T"]),
            int(flat["keys_Q"][-1]),
            len(flat["queries_Q"]) - 1,
            *self.longest,
            len(flat["targets_N"]),
            len(flat["learnt_B"]) - 1,
            1 + int(np.count_nonzero(np.diff(self.clients_G))),
            self.num_slots,
        )


@dataclass(frozen=True, eq=False)
class PassInputs:
    """A pass on a device. `buffer` holds all its tensors; what is written to it is the next pass."""

    buffer: PassBuffer
    flat: FlatRow
    route: Route
    weights_N: torch.Tensor


def place(arrays: PassArrays, device: torch.device) -> PassInputs:
    """Return a pass on a device, where it gets in one copy."""
    buffer = PassBuffer(arrays.named(), device)
    tensors = buffer.tensors
    noise = None
    if arrays.noise:
        drops = Drops(tensors["seeds_T"], tensors["positions_T"], tensors["rates_T"])
        noise = Noise(arrays.noise, drops)
    lengths_G, clients_G = arrays.lengths_G.tolist(), arrays.clients_G.tolist()
    route = Route(
        segments(lengths_G, clients_G),
        segments(lengths_G, arrays.slots_G.clip(0).tolist()),
        route_tensors(tensors),
        noise,
    )
    return PassInputs(buffer, flat_row(tensors, arrays.longest), route, tensors["weights_N"])


def padded(arrays: PassArrays, room: Sizes) -> PassArrays:
    """Return a pass that fills `room`, its `rounded_up` sizes, and has the same losses and gradients.

    What is added has weight zero, no slot and sequences of its own, and samples that learn nothing.
    """
    needs, flat = arrays.sizes, arrays.flat
    more_T, more_K = room.tokens - needs.tokens, room.keys - needs.keys
    queries_Q, keys_Q = (_even(more, num_padding(needs, room)) for more in (more_T, more_K))
    num_sequences = room.sequences - needs.sequences
    # Spread over the tokens: what is added to one place again and again is slow on a GPU.
    predicting = (needs.tokens + np.arange(room.supervised - needs.supervised)) % room.tokens
    added = {
        "positions_T": np.arange(more_T) - starts(queries_Q).repeat(queries_Q),
        "queries_Q": _ends(needs.tokens, queries_Q, num_sequences),
        "keys_Q": _ends(needs.keys, keys_Q, num_sequences),
        "places_K": _padding_keys(needs.tokens, queries_Q, keys_Q),
        "predicting_N": predicting,
        "learnt_B": np.full(room.samples - needs.samples, needs.supervised),
    }
    zeros = {"T": more_T, "N": len(predicting)}  # what else a token or a learnt token has
    if room.keys > room.tokens:
        flat = {"places_K": np.arange(needs.tokens), **flat}
    return replace(
        arrays,
        flat={
            name: np.append(array, added.get(name, np.zeros(zeros.get(name[-1], 0)))).astype(array.dtype)
            for name, array in flat.items()
        },
        longest=(room.longest_queries, room.longest_keys),
        lengths_G=np.append(arrays.lengths_G, more_T),
        clients_G=np.append(arrays.clients_G, 0),
        slots_G=np.append(arrays.slots_G, -1),
        num_slots=room.slots,
        num_tiles=most_tiles(room.tokens, room.clients + 1),
    )


def _even(total: int, number: int) -> Array:
    """Return `number` sizes that differ by one at most, the larger ones first."""
    every, larger = divmod(total, max(1, number))
    return every + (np.arange(number) < larger).astype(np.int64)


def _ends(begin: int, sizes: Array, number: int) -> Array:
    """Return where `number` sequences from `begin` on end, of which those without a size are empty."""
    return begin + np.append(sizes, np.zeros(number - len(sizes), np.int64)).cumsum()


def _padding_keys(begin: int, queries_Q: Array, keys_Q: Array) -> Array:
    """Return where the keys of padding are, from token `begin` on: each sequence ends with its own."""
    ends_Q = begin + queries_Q.cumsum()
    back_K = keys_Q.cumsum().repeat(keys_Q) - np.arange(keys_Q.sum())  # 1 for the last of a sequence
    places_K: Array = (ends_Q.repeat(keys_Q) - back_K).clip(begin)
    return places_K
