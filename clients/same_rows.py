"""A run goes on with the rows it began with: a node with a file of its own notices that the file was edited.

Where rows are dealt from `data.source`, `fedllm run` compares them itself before a run goes on.
"""

from collections.abc import Mapping

from clients.data_holder import DataHolder
from clients.technique import failure_of
from fedllm.errors import CheckpointError, DataError
from fedllm.files import make_private_folder, write_file
from fedllm.messages import ClientFailure


def refuse_edited(holder: DataHolder, drawn: Mapping[str, int]) -> dict[str, ClientFailure]:
    """Return the clients of `drawn`, by name, whose rows are not those of their first round in this run.

    `drawn` counts the rows that each has drawn so far; at 0 a run begins, and its rows are noted.
    """
    failed = {}
    for name, num_drawn in drawn.items() if holder.data_path is not None else ():
        try:
            _check(holder, name, has_begun=num_drawn > 0)
        except (CheckpointError, DataError) as error:
            failed[name] = failure_of(name, error)
    return failed


def _check(holder: DataHolder, name: str, *, has_begun: bool) -> None:
    # By the plan too: another run of the same name need not have the same rows.
    file = holder.store.folder / name / f"rows-{holder.plan.digest[:16]}"
    now = holder.clients[name].digest
    try:
        noted = file.read_text() if file.exists() else ""
        if noted == now:
            return
        if has_begun and noted:
            raise DataError(
                f"client {name}: its rows were edited since this run began; restore them, or start the run"
                " anew under another run.name"
            )
        make_private_folder(file.parent)
        write_file(file, now)
    except OSError as error:
        raise CheckpointError(
            f"client {name}: {file} cannot be kept ({error.strerror}); free space or set state-path"
        ) from None
