"""A checkpoint after every round, from which a run continues bit for bit.

`checkpoints/round-00003/` holds the adapter, counts and records, what was added to the base model, what the
server optimizer remembers, and a manifest of them all. It is built in a hidden folder and renamed, so that it
is whole or absent; the one before is kept, so that a damaged newest one costs a single round. A few earlier
ones are kept for a run that has to forget a client: it goes back to before that client's first turn.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import cast

from fedllm.adapters.base_delta import BaseDelta, from_tensors, no_base_delta, to_tensors
from fedllm.adapters.folder import load_named, load_tensors, save_named, save_tensors
from fedllm.adapters.layout import AdapterLayout, AdapterState, layout_from_dict
from fedllm.config.key import Scalar
from fedllm.errors import CheckpointError, ConfigError, FedLLMError, LayoutError
from fedllm.files import complete_folder, verify_manifest
from fedllm.privacy.ledger import Ledger, ledger_from_dict, ledger_to_dict
from fedllm.runs.records import OptimizerState, RoundRecord, record_from_dict, record_to_dict

_ROUND = re.compile(r"round-\d{5,}")
NUM_KEPT = 2  # should the newest be damaged, a run goes on from the one before
MOST_BYTES = 1 << 30  # of all checkpoints before the newest two
# Written only where they hold something.
BASE_DELTA, OPTIMIZER, CONTROL = "base-delta.safetensors", "optimizer.safetensors", "control.safetensors"
UNDISTILLED = "undistilled.safetensors"


@dataclass(frozen=True, eq=False)
class ServerState:
    """What a server carries from round to round, and all a resumed run needs.

    `round_num` is the last complete round (0 = none), `num_drawn` counts the rows each client has drawn.
    `base_delta` is what the base model has gained (left out: nothing). `norms` are the median norms of the
    last rounds' changes, which robust rules compare with; `control` is SCAFFOLD's c, once there is one.
    `ledger` is what was given away under a privacy plan, `clip` the norm that an adaptive clip has come to
    (0 = the plan's own). `undistilled` is what the last round aggregated, where distilling it gave `adapter`.
    """

    round_num: int
    adapter: AdapterState
    num_drawn: Mapping[str, int] = field(default_factory=dict)
    records: tuple[RoundRecord, ...] = ()
    base_delta: BaseDelta = cast(BaseDelta, None)  # filled in below, since it needs the layout
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    norms: tuple[float, ...] = ()
    control: AdapterState | None = None
    ledger: Ledger = Ledger()
    clip: float = 0.0
    undistilled: AdapterState | None = None

    def __post_init__(self) -> None:
        if cast(BaseDelta | None, self.base_delta) is None:
            object.__setattr__(self, "base_delta", no_base_delta(self.adapter.layout))


def save_checkpoint(folder: Path, state: ServerState, keys: Mapping[str, Scalar]) -> None:
    """Write the checkpoint of `state` below `folder` and remove those of no more use (`rounds_to_keep`).

    `keys` is the whole configuration, flat; `load_checkpoint` compares it with that of the resumed run.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are untouched.
    """
    content = {
        "round": state.round_num,
        "num_drawn": dict(state.num_drawn),
        "records": [record_to_dict(record) for record in state.records],
        "config": dict(keys),
        "layout": state.adapter.layout.to_dict(),
        "norms": list(state.norms),
        "num_steps": state.optimizer.num_steps,
        "ledger": ledger_to_dict(state.ledger),
        "clip": state.clip,
    }
    try:
        with complete_folder(_path(folder, state.round_num)) as building:
            (building / "state.json").write_text(json.dumps(content, allow_nan=False))
            save_tensors(building / "adapter.safetensors", state.adapter)
            if state.base_delta.size:
                save_named(building / BASE_DELTA, to_tensors(state.base_delta))
            if state.optimizer.num_steps:
                moments = {"first": state.optimizer.first, "second": state.optimizer.second}
                save_named(building / OPTIMIZER, moments)
            if state.control is not None:
                save_tensors(building / CONTROL, state.control)
            if state.undistilled is not None:
                save_tensors(building / UNDISTILLED, state.undistilled)
    except (OSError, FedLLMError) as error:
        _remove(_rounds(folder)[NUM_KEPT:])  # a full disk then has room for the next try
        raise CheckpointError(f"round {state.round_num} could not be saved in {folder}: {error}") from None
    saved = {_number(path): path for path in _rounds(folder)}
    size = sum(file.stat().st_size for file in _path(folder, state.round_num).iterdir())
    kept = rounds_to_keep(saved, state.records, MOST_BYTES // size)
    _remove(path for number, path in saved.items() if number not in kept)


def rounds_to_keep(saved: Iterable[int], records: Iterable[RoundRecord], most: int) -> set[int]:
    """Return which checkpoints stay: the newest two, and at most `most` for a run that has to forget.

    Those are of the round before each client's first turn, and of the powers of two, from which a run goes on
    where the former is damaged or missing. Of too many the one goes whose loss costs the fewest rounds.
    """
    ordered = sorted(saved)
    earlier, newest = ordered[:-NUM_KEPT], ordered[-NUM_KEPT:]
    first_turns: dict[str, int] = {}
    for record in records:
        for client in record.asked:
            first_turns.setdefault(client, record.round_num)
    before = {round_num - 1 for round_num in first_turns.values()}
    kept = {number for number in earlier if number in before or not number & (number - 1)}
    while len(kept) > most:
        _, cheapest = min((later - earlier, later) for earlier, later in pairwise([0, *sorted(kept)]))
        kept.remove(cheapest)
    return kept.union(newest)


def newest_round(folder: Path) -> int:
    """Return the last round with a checkpoint below `folder`; 0 = none, so there is no run to resume."""
    return max(saved_rounds(folder), default=0)


def saved_rounds(folder: Path) -> list[int]:
    """Return the rounds that have a checkpoint below `folder`, the oldest first."""
    return sorted(map(_number, _rounds(folder)))


def check_resumable(folder: Path, fixed: Mapping[str, Scalar]) -> None:
    """Compare the keys in the newest checkpoint with those of `load_checkpoint`, and read nothing else.

    Raises:
        ConfigError: the checkpoint is of another configuration; the difference is named.
    """
    for path in _rounds(folder):
        try:
            saved = dict(json.loads((path / "state.json").read_text())["config"])
        except (OSError, ValueError, KeyError, TypeError):  # what is wrong with it `load_checkpoint` says
            continue
        _check_same(saved, fixed)
        return


def newest_checkpoint(folder: Path, last: int | None = None) -> tuple[ServerState, list[str]]:
    """Return the newest intact state below `folder`, and a line about every other passed over.

    With `last` it is that of the round `last` or an earlier one.

    Raises:
        CheckpointError: there is none.
    """
    state, _, passed_over = _newest(folder, last)
    return state, passed_over


def load_checkpoint(
    folder: Path, fixed: Mapping[str, Scalar], layout: AdapterLayout
) -> tuple[ServerState, list[str]]:
    """Return the state of `newest_checkpoint` for a run to go on from, and its lines.

    `fixed` has the keys that a run must share with the one it continues (`fixed_keys` of the plan).

    Raises:
        CheckpointError: there is no intact checkpoint.
        ConfigError: the checkpoint is of another configuration or base model; the difference is named.
    """
    state, saved_keys, passed_over = _newest(folder)
    _check_same(saved_keys, fixed)
    if state.adapter.layout.digest != layout.digest:
        raise ConfigError(
            f"{_path(folder, state.round_num)} is of another base model or adapter layout; resume with the"
            " same model"
        )
    return state, passed_over


def _newest(folder: Path, last: int | None = None) -> tuple[ServerState, dict[str, Scalar], list[str]]:
    """Return the newest intact state, the keys of the run that wrote it, and a line about every other."""
    passed_over: list[str] = []
    for path in _rounds(folder):
        if last is not None and _number(path) > last:
            continue
        try:
            verify_manifest(path)  # first: what follows trusts that every file is there as it was written
            return *_read_checkpoint(path), [f"{line}; using the one before it" for line in passed_over]
        except (CheckpointError, KeyError, TypeError, AttributeError):  # whole, and not what this code writes
            passed_over.append(f"{path.name} was written by another version of fedllm")
        except (FedLLMError, OSError, ValueError) as error:
            passed_over.append(f"{path.name} is damaged ({error})")
    found = passed_over[0] if passed_over else "it is empty"
    raise CheckpointError(
        f"no intact checkpoint in {folder}: {found}; restore it, or start anew under another run.name"
    )


def _read_checkpoint(path: Path) -> tuple[ServerState, dict[str, Scalar]]:
    """Return the state in one checkpoint folder, and the keys of the run that wrote it."""
    content = json.loads((path / "state.json").read_text())
    layout = layout_from_dict(content["layout"])
    state = ServerState(
        round_num=content["round"],
        adapter=load_tensors(path / "adapter.safetensors", layout).checked_finite(),
        num_drawn=content["num_drawn"],
        records=tuple(record_from_dict(values) for values in content["records"]),
        base_delta=_load_base_delta(path / BASE_DELTA, layout),
        optimizer=_load_optimizer(path / OPTIMIZER, content["num_steps"], layout.size),
        norms=tuple(content["norms"]),
        control=_load_adapter(path / CONTROL, layout),
        ledger=ledger_from_dict(content["ledger"]),
        clip=content["clip"],
        undistilled=_load_adapter(path / UNDISTILLED, layout),
    )
    return state, content["config"]


def _load_adapter(file: Path, layout: AdapterLayout) -> AdapterState | None:
    return load_tensors(file, layout).checked_finite() if file.exists() else None


def _load_base_delta(file: Path, layout: AdapterLayout) -> BaseDelta:
    if not file.exists():  # nothing was added to the base model
        return no_base_delta(layout)
    return from_tensors(layout, load_named(file)).checked_finite()


def _load_optimizer(file: Path, num_steps: int, size: int) -> OptimizerState:
    if not num_steps:
        return OptimizerState()
    tensors = load_named(file)
    state = OptimizerState(tensors["first"], tensors["second"], num_steps)
    if state.first.shape != (size,) or state.second.shape != (size,):
        raise LayoutError(f"{file.name} is of another adapter")
    return state


def _check_same(saved: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> None:
    unknown = [key for key in now if key not in saved]
    if unknown:
        raise ConfigError(
            f"cannot resume: the run was begun by another version of fedllm, without the key {unknown[0]};"
            " go on with that version, or start anew under another run.name"
        )
    changed = [key for key in now if saved[key] != now[key]]
    if changed:
        shown = "; ".join(f"{key} was {saved[key]!r}, now {now[key]!r}" for key in changed[:3])
        raise ConfigError(
            f"cannot resume with another configuration: {shown}; restore it, or choose another run.name"
        )


def _path(folder: Path, round_num: int) -> Path:
    return folder / f"round-{round_num:05d}"


def _rounds(folder: Path) -> list[Path]:
    """Return the complete checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("round-*") if _ROUND.fullmatch(path.name)), reverse=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("round-"))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
