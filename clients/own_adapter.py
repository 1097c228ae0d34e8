"""The adapter of a run whose server has none (`secure.method = shares`): every client goes on from its own.

It keeps that of each of the last rounds, so that a server which was stopped finds the round it resumes after.
Before round 1 it is the adapter that the run's seed gives.
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from clients.data_holder import DataHolder
from clients.parties import own_keys
from clients.state import write_newest
from fedllm.adapters.layout import AdapterState
from fedllm.errors import CheckpointError, LayoutError, NotHeldError
from fedllm.files import make_private_folder
from fedllm.messages import EvaluateRequest, TrainRequest

Request = TypeVar("Request", TrainRequest, EvaluateRequest)


def from_own_adapter(holder: DataHolder, request: Request, round_num: int) -> Request:
    """Return a request that starts from the adapter which its first client has after a round.

    Raises:
        NotHeldError: it has none, as where its node was away in that round.
        BadPartiesError: it is no client of this node.
    """
    return replace(request, adapter=own_adapter(holder, next(iter(request.drawn)), round_num))


def own_adapter(holder: DataHolder, client_id: str, round_num: int) -> AdapterState:
    """Return the adapter that a client has after a round; raises as `from_own_adapter`."""
    if not round_num:
        return holder.initial
    file = _file(holder, client_id, round_num)
    try:
        vector = load(file.read_bytes())["adapter"]
        return AdapterState(holder.engine.layout, vector).checked_finite()
    except (OSError, SafetensorError, KeyError, ValueError, LayoutError):
        raise NotHeldError(
            f"client {client_id} has no adapter of round {round_num}, in which it was away; it cannot go on,"
            " since the server of this run has none either"
        ) from None


def keep_own_adapter(holder: DataHolder, client_id: str, round_num: int, state: AdapterState) -> None:
    """Keep the adapter that a client has after a round, and of earlier ones the newest few.

    Later ones are removed: the server has gone back, or has begun the run anew.

    Raises:
        CheckpointError: it cannot be written.
    """
    file = _file(holder, client_id, round_num)
    try:
        make_private_folder(file.parent)
        write_newest(file, save({"adapter": state.vector.contiguous()}))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be written ({error.strerror}); free space or set state-path"
        ) from None


def next_adapter(start: AdapterState, change_P: torch.Tensor) -> AdapterState:
    """Return the adapter after a mean change [P] of one factor: as a server's plain mean gives it."""
    return AdapterState(start.layout, start.vector + change_P).checked_finite()


def _file(holder: DataHolder, client_id: str, round_num: int) -> Path:
    folder = own_keys(holder, client_id).folder
    return folder / f"round-{round_num:06d}.safetensors"
