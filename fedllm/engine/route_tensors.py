"""Where the tokens of a pass belong, as tensors on a device: what a kernel for a GPU reads of a route.

Suffixes: T token, G group of neighbouring tokens with one client and one slot, N tile, S slot.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch

from fedllm.engine.pass_buffer import Array

TILE = 64  # tokens at most


@dataclass(frozen=True, eq=False)
class RouteTensors:
    """Every token's rows in a bank, and runs of tokens whose rows are equal.

    A tile is up to `TILE` neighbouring tokens of one client. A token of no slot has slot 0 in `slots_T`, but
    lies in no slot's run; its gradients are zero.
    """

    owners_T: torch.Tensor  # the client of each token
    slots_T: torch.Tensor
    tile_begin: torch.Tensor  # [N] int32, as all that follows
    tile_end: torch.Tensor
    tile_client: torch.Tensor
    slot_begin_S: torch.Tensor
    slot_end_S: torch.Tensor  # where it begins if the slot has no token


def route_tensors(tensors: Mapping[str, torch.Tensor]) -> RouteTensors:
    """Return a route from tensors, by name, that `route_arrays` became."""
    return RouteTensors(**{field.name: tensors[field.name] for field in fields(RouteTensors)})


def most_tiles(num_tokens: int, num_runs: int) -> int:
    """Return how many tiles runs of tokens have at most."""
    return num_tokens // TILE + num_runs


def route_arrays(
    lengths_G: Array, clients_G: Array, slots_G: Array, num_slots: int, num_tiles: int = 0
) -> dict[str, Array]:
    """Return the arrays of `RouteTensors`, by name. The tokens of a slot are neighbours; -1 is no slot.

    Fewer than `num_tiles` tiles are followed by empty ones.
    """
    bounds_G = np.concatenate([[0], lengths_G.cumsum()])
    begins, ends, clients = _runs(bounds_G, clients_G)
    tiles = -(-(ends - begins) // TILE)
    number_N = np.arange(tiles.sum()) - (tiles.cumsum() - tiles).repeat(tiles)  # in its run
    tile_begin_N = begins.repeat(tiles) + TILE * number_N
    empty_N = np.zeros(max(0, num_tiles - len(tile_begin_N)), np.int64)
    slot_begin_S, slot_end_S = np.zeros(num_slots, np.int32), np.zeros(num_slots, np.int32)
    for begin, end, slot in zip(*_runs(bounds_G, slots_G), strict=True):
        if slot >= 0:
            slot_begin_S[slot], slot_end_S[slot] = begin, end
    return {
        "owners_T": clients_G.repeat(lengths_G),
        "slots_T": slots_G.clip(0).repeat(lengths_G),
        "tile_begin": np.append(tile_begin_N, empty_N).astype(np.int32),
        "tile_end": np.append(np.minimum(tile_begin_N + TILE, ends.repeat(tiles)), empty_N).astype(np.int32),
        "tile_client": np.append(clients.repeat(tiles), empty_N).astype(np.int32),
        "slot_begin_S": slot_begin_S,
        "slot_end_S": slot_end_S,
    }


def _runs(bounds_G: Array, values_G: Array) -> tuple[Array, Array, Array]:
    """Return where runs of equal values begin and end, in tokens, and the values."""
    (changes,) = np.diff(values_G).nonzero()
    firsts = np.concatenate([[0], changes + 1])
    return bounds_G[firsts], bounds_G[np.concatenate([firsts[1:], [-1]])], values_G[firsts]
