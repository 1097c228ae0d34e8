"""Class A: a new run that goes on from before a client's first turn, without the client or some of its rows.

Only the folder is made here. The run in it is resumed as any other is, in whichever runtime, and a kill costs
what it costs any other run.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example
from fedllm.data.shards import examples_digest
from fedllm.errors import CheckpointError, ConfigError
from fedllm.files import make_private_folder, write_file
from fedllm.runs.checkpoint import ServerState, newest_checkpoint, newest_round, save_checkpoint
from fedllm.runs.folder import CHECKPOINTS, START, read_keys, read_left_out, run_folder, write_left_out
from fedllm.runs.lineage import adapter_digest, note_clients, noted_clients
from fedllm.runs.records import RoundRecord
from fedllm.runs.unlearning import Unlearning, read_unlearning, write_unlearning
from strategies.unlearning.guarantee import Guarantee

FORGETS = "forgets.json"  # in the new run's private folder: whom or what it was begun to forget


def replayed_config(run: Path, name: str) -> RunConfig:
    """Return the configuration of the run that forgets, which lies next to the one in `run`.

    Raises:
        ConfigError: the keys of `run` cannot be read, or the name is none of a run.
    """
    output = str(run.resolve().parent)
    return RunConfig.from_flat(read_keys(run)).override(
        {"run.name": name, "run.output": output, "run.resume": True}
    )


def begin_replay(
    run: Path,
    client: str,
    guarantee: Guarantee,
    name: str,
    *,
    rows: bool = False,
    examples: Sequence[Example] = (),
) -> Path:
    """Write the folder of the run that forgets, up to the state it goes on from, and return it.

    With `rows` the client stays in it: its own machine leaves the rows out (`clients.forgotten`), which are
    `examples` where they are known here. The same call again changes nothing, whether a kill fell into the
    first one or into the rounds after it.

    Raises:
        ConfigError: the folder of that name holds something else, such as a run that forgets another client.
        CheckpointError, OSError: it cannot be written.
    """
    config = replayed_config(run, name)
    folder, state = run_folder(config), _state_before(run, guarantee.first_round)
    begun = Unlearning(
        kind="A",
        method="replay",
        parent=adapter_digest(run / "adapter"),
        reason=guarantee.why,
        rounds=guarantee.num_rounds - (state.round_num if state else 0),
    )
    wanted, forgets = _forgets(client, rows=rows, examples=examples), folder / "private" / FORGETS
    if folder.exists() and any(folder.iterdir()):
        is_same = read_unlearning(folder) == begun and (not forgets.exists() or forgets.read_text() == wanted)
        # Which rows a site had forgotten by the time of a finished run, nobody here knows.
        if not is_same or (rows and not examples and (folder / "adapter").exists()):
            raise ConfigError(f"{folder}: holds something already; choose another --name")
    folder.mkdir(parents=True, exist_ok=True)
    write_unlearning(folder, begun)  # first, so that the next call knows whose folder it is
    make_private_folder(forgets.parent)
    write_file(forgets, wanted)
    if left_out := read_left_out(run) | ({client} if not rows else set()):
        write_left_out(folder, left_out)
    if (run / START).exists():
        shutil.copytree(guarantee.instead or run / START, folder / START, dirs_exist_ok=True)
    if state is not None and not newest_round(folder / CHECKPOINTS):
        known = noted_clients(run)  # of the rounds that are kept, some may not join again
        note_clients(folder, {one: known[one] for one in state.num_drawn if one in known})
        # Last: from now on the run can go on.
        save_checkpoint(folder / CHECKPOINTS, state if rows else _without(state, client), config.to_flat())
    return folder


def _forgets(client: str, *, rows: bool, examples: Sequence[Example]) -> str:
    """Return whom or what a run forgets, to compare with a later call."""
    return json.dumps({"client": client, "rows": examples_digest(examples) if rows else None})


def _state_before(run: Path, first_round: int) -> ServerState | None:
    """Return the newest kept state before a round, None where that is the state before the first round."""
    try:
        return newest_checkpoint(run / CHECKPOINTS, last=first_round - 1)[0] if first_round > 1 else None
    except CheckpointError:
        return None  # its checkpoints were thinned or lost: all rounds are done again


def _without(state: ServerState, client: str) -> ServerState:
    """Return a state whose records say nothing of a client that has trained in none of their rounds."""

    def scrubbed(record: RoundRecord) -> RoundRecord:
        held_out, personal = dict(record.held_out), dict(record.personal_held_out)
        held_out.pop(client, None)
        personal.pop(client, None)
        others = tuple(name for name in record.not_finite if name != client)
        return replace(record, held_out=held_out, personal_held_out=personal, not_finite=others)

    return replace(state, records=tuple(map(scrubbed, state.records)))
