"""Class C of unlearning: clients in groups, an adapter for each group, and the mean of the groups' products.

What a client has taught is in the adapter of its group alone, so to forget it one group is trained again
(SISA, arXiv 1912.03817, with clients in place of rows). Groups learn nothing from one another until the end,
which is what this costs in quality: between groups it is one-shot averaging.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fedllm.adapters.algebra import Product, truncate
from fedllm.adapters.layout import AdapterState
from fedllm.errors import ConfigError
from fedllm.privacy.keys import derived_key
from fedllm.runs.folder import GROUPS


def group_of(client: str, number: int, seed: int) -> int:
    """Return the group of a client among `number`; who else takes part changes nothing."""
    return int.from_bytes(derived_key(str(seed).encode(), "group", client)[:8], "big") % number


def in_groups(clients: Iterable[str], number: int, seed: int) -> dict[int, list[str]]:
    """Return the clients of every group that has any, both in order."""
    found: dict[int, list[str]] = {}
    for client in sorted(clients):
        found.setdefault(group_of(client, number, seed), []).append(client)
    return {group: found[group] for group in sorted(found)}


def read_groups(run: Path) -> dict[int, list[str]]:
    """Return the clients of every group of a run.

    Raises:
        ConfigError: it has no groups, or the file is damaged.
    """
    try:
        return {
            int(group): list(clients) for group, clients in json.loads((run / GROUPS).read_text()).items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{run / GROUPS}: no groups of clients ({type(error).__name__})") from None


def group_in_folder(run: Path, client: str) -> int:
    """Return the group of a client in a run.

    Raises:
        ConfigError: the folder holds no run of groups with this client.
    """
    for group, clients in read_groups(run).items():
        if client in clients:
            return group
    raise ConfigError(f"{run}: client {client!r} is in no group")


def mean_of_groups(adapters: Sequence[AdapterState], sizes: Sequence[int]) -> AdapterState:
    """Return the mean of the adapters' products, each counted by its clients, at the rank they all have."""
    layout = adapters[0].layout
    shares = [size / sum(sizes) for size in sizes]
    factors = []
    for pairs in zip(*(layout.factors(one.vector) for one in adapters), strict=True):
        left = torch.cat(
            [share * b_OR.double() for share, (_, b_OR) in zip(shares, pairs, strict=True)], dim=1
        )
        right = torch.cat([a_RI.double() for a_RI, _ in pairs])
        read = truncate(Product(left[None], right[None]), layout.rank, pairs[0][0][None])
        factors.append((read.a_LRI[0].float(), read.b_LOR[0].float()))
    return AdapterState(layout, layout.flatten(factors))
