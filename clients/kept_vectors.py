"""The vectors that the clients of a run keep between rounds, as its techniques name them.

All of a client's are in one file a state (`clients.state`), so that they always belong together.
"""

import logging
from collections.abc import Mapping, Sequence

from clients.state import PrivateStore, load_private, save_private
from clients.technique import Technique, Vectors, Works
from fedllm.errors import CheckpointError
from fedllm.messages import ClientFailure

_logger = logging.getLogger("fedllm.clients")


def load_kept(
    store: PrivateStore, techniques: Sequence[Technique], drawn: Mapping[str, int]
) -> dict[str, Vectors]:
    """Return by name what each client kept for these techniques when it had drawn so many rows.

    Every client has an entry, which is empty before its first round and where its state is lost.
    """
    sizes = {name: size for technique in techniques for name, size in technique.kept.items()}
    # Without sizes no file is looked for: most runs keep nothing.
    return {
        client_id: load_private(store, client_id, num_drawn, sizes) if sizes else {}
        for client_id, num_drawn in drawn.items()
    }


def save_kept(store: PrivateStore, works: Works, num_rows: int) -> dict[str, ClientFailure]:
    """Write what each client keeps after drawing `num_rows` more rows; return those that could not."""
    failed = {}
    for work in works:
        client_id = work.client.client_id
        if work.keeps:
            try:
                save_private(store, client_id, work.num_drawn + num_rows, work.keeps)
            except CheckpointError as error:  # its update would not match what it has next round
                _logger.error("%s", error)
                failed[client_id] = ClientFailure(client_id=client_id, code=error.code)
    return failed
