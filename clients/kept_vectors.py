"""Which vectors the clients of a run keep for themselves: a personal adapter, SCAFFOLD's c_i, a local B.

All of a client's are in one file a state (`clients.state`), so that they always belong together.
"""

import logging
from collections.abc import Mapping

import torch

from clients.data_holder import DataHolder
from clients.personal import personal_layout
from clients.state import load_private, save_private
from fedllm.adapters.parts import part_size
from fedllm.errors import CheckpointError
from fedllm.messages import ClientFailure, EvaluateRequest, TrainRequest

PERSONAL, CONTROL, LOCAL_B = "personal", "control", "local-b"  # names in the store
_logger = logging.getLogger("fedllm.clients")


def kept_vectors(
    holder: DataHolder, request: TrainRequest | EvaluateRequest, drawn: Mapping[str, int]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return by name what each client kept when it had drawn so many rows, and a request makes use of.

    Every client has an entry, which is empty before its first round and where its state is lost.
    """
    layout, sizes = request.adapter.layout, dict[str, int]()
    if holder.plan.personal is not None:
        sizes[PERSONAL] = personal_layout(layout, holder.plan.personal).size
    if isinstance(request, TrainRequest) and request.control is not None:
        sizes[CONTROL] = layout.size
    if request.local_b:
        sizes[LOCAL_B] = part_size(layout, "b")
    if not sizes:
        return {client_id: {} for client_id in drawn}
    return {
        client_id: load_private(holder.store, client_id, num_drawn, sizes)
        for client_id, num_drawn in drawn.items()
    }


def keep_vectors(
    holder: DataHolder, drawn: Mapping[str, int], vectors: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, ClientFailure]:
    """Write what each client keeps when it has drawn so many rows; return those that could not."""
    failed = {}
    for client_id, own in vectors.items():
        if own:
            try:
                save_private(holder.store, client_id, drawn[client_id], own)
            except CheckpointError as error:
                _logger.error("%s", error)
                failed[client_id] = ClientFailure(client_id=client_id, code=error.code)
    return failed
