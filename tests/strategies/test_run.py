"""Whole runs in this process: what they leave on disk, and how they go on after a failure."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.client_app import app
from fedllm.adapters.folder import WEIGHTS, load_adapter
from fedllm.chained_log import read_entries, verify
from fedllm.config.run_config import RunConfig
from fedllm.errors import CheckpointError, ConfigError, RunFailedError
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import run_folder
from fedllm.runs.records import RoundRecord, record_to_dict
from scripts.runtimes.local import local_grid
from strategies.run import run_federation
from strategies.session import Watch


@pytest.fixture
def run(make_config: Callable, tmp_path: Path) -> Callable[..., tuple[ServerState, list[str]]]:
    """Return a function (name, hook on every record, **flat overrides) that does a run of three rounds."""

    def do(name: str, hook: Callable[[RoundRecord], None] = lambda record: None, **flat: Any) -> Any:
        notices: list[str] = []
        config = make_config({**plan(tmp_path, name), **flat})
        grid = local_grid(config, app, num_nodes=4)
        return run_federation(config, grid, Watch(notice=notices.append, record=hook)), notices

    return do


def plan(tmp_path: Path, name: str) -> dict[str, Any]:
    return {"run.output": str(tmp_path), "run.name": name, "federation.num-rounds": 3}


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def numbers_of(record: RoundRecord) -> dict[str, Any]:
    values = record_to_dict(record)
    return {
        **values,
        "seconds": 0,
        "training": {**values["training"], "seconds": {}},
        "held_out": {},
        "mean_held_out": 0,
        "bytes_down": 0,
        "bytes_up": 0,
    }


def interrupt_after(round_num: int) -> Callable[[RoundRecord], None]:
    """Return a hook that stops the process, as it were, before a round is saved."""

    def hook(record: RoundRecord) -> None:
        if record.round_num == round_num:
            raise KeyboardInterrupt

    return hook


def test_a_run_leaves_its_adapter_records_and_result(run: Callable, tmp_path: Path) -> None:
    state, notices = run("whole")
    folder = tmp_path / "whole"
    assert notices == []
    assert load_adapter(folder / "adapter").state.digest == state.adapter.digest
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    result = result_of(folder)
    assert (result["status"], result["rounds"], result["digest"]) == ("completed", 3, state.adapter.digest)
    before, after = result["held_out"]["before"], result["held_out"]["after"]
    assert set(before["clients"]) == set(after["clients"]) == {"anna", "ben", "cleo", "dora"}
    assert after["mean"] < before["mean"]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["round-00001", "round-00002", "round-00003"]  # the first two are powers of two


@pytest.mark.parametrize("overrides", [{}, {"train.schedule": "cosine", "wire.codec": "int8"}])
@pytest.mark.parametrize("stopped_in", [2, 3])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    stopped_in: int, overrides: dict[str, Any], run: Callable, tmp_path: Path
) -> None:
    whole, _ = run("whole", **overrides)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", interrupt_after(stopped_in), **overrides)
    assert not (tmp_path / "stopped" / "adapter").exists()
    resumed, notices = run("stopped", **{"run.resume": True}, **overrides)
    assert notices == [f"resuming after round {stopped_in - 1}"]
    assert resumed.adapter.digest == whole.adapter.digest
    assert resumed.num_drawn == whole.num_drawn
    assert list(map(numbers_of, resumed.records)) == list(map(numbers_of, whole.records))
    saved = [(tmp_path / name / "adapter" / WEIGHTS).read_bytes() for name in ("whole", "stopped")]
    assert saved[0] == saved[1]


def test_a_finished_run_can_be_made_longer(run: Callable) -> None:
    whole, _ = run("whole")
    run("short", **{"federation.num-rounds": 1})
    longer, _ = run("short", **{"run.resume": True})
    assert longer.adapter.digest == whole.adapter.digest


def test_a_damaged_newest_checkpoint_costs_one_round(run: Callable, tmp_path: Path) -> None:
    whole, _ = run("whole")
    os.truncate(tmp_path / "whole" / "checkpoints" / "round-00003" / "adapter.safetensors", 50)
    again, notices = run("whole", **{"run.resume": True})
    assert notices[0].startswith("round-00003 is damaged")
    assert notices[1:] == ["resuming after round 2"]
    assert again.adapter.digest == whole.adapter.digest


def test_a_run_resumes_only_with_its_own_keys_and_checkpoints(run: Callable) -> None:
    run("mine", **{"federation.num-rounds": 1})
    with pytest.raises(ConfigError, match="holds an earlier run"):
        run("mine")
    with pytest.raises(ConfigError, match=r"train\.learning-rate was 0\.05, now 0\.1"):
        run("mine", **{"run.resume": True, "train.learning-rate": 0.1})


def test_resume_of_nothing_starts_the_run(run: Callable, tmp_path: Path) -> None:
    whole, _ = run("whole")
    # what a kill in the first checkpoint leaves
    (tmp_path / "begun" / "checkpoints" / ".round-00001-abcd1234").mkdir(parents=True)
    begun, notices = run("begun", **{"run.resume": True})
    assert "starting" in notices[0]
    assert begun.adapter.digest == whole.adapter.digest
    assert not list((tmp_path / "begun" / "checkpoints").glob(".*"))


def test_a_run_killed_in_its_first_round_begins_anew(run: Callable) -> None:
    whole, _ = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", interrupt_after(1))
    again, _ = run("stopped")
    assert again.adapter.digest == whole.adapter.digest


def test_a_second_run_in_the_folder_of_a_living_one_is_refused(run: Callable, tmp_path: Path) -> None:
    refused: list[str] = []

    def begin_another(record: RoundRecord) -> None:
        with pytest.raises(ConfigError, match="another process is doing this run") as caught:
            run("mine", **{"run.resume": True})
        refused.append(str(caught.value))

    whole, _ = run("whole")
    state, _ = run("mine", begin_another)
    assert len(refused) == 4
    assert state.adapter.digest == whole.adapter.digest
    assert result_of(tmp_path / "mine")["status"] == "completed"


def test_a_refused_resume_leaves_the_finished_run_as_it_was(run: Callable, tmp_path: Path) -> None:
    run("mine", **{"federation.num-rounds": 1})
    before = result_of(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"was 0\.05, now 0\.1"):
        run("mine", **{"run.resume": True, "train.learning-rate": 0.1})
    assert result_of(tmp_path / "mine") == before


def test_a_published_adapter_is_readable_and_private_state_is_not(run: Callable, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run("mine", **{"federation.num-rounds": 1, "personal.mode": "ditto"})
    finally:
        os.umask(before)

    def modes(folder: Path) -> set[tuple[bool, int]]:
        paths = [folder, *folder.rglob("*")]
        return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in paths}

    assert modes(tmp_path / "mine" / "adapter") == {(True, 0o755), (False, 0o644)}
    assert modes(tmp_path / "mine" / "private") == {(True, 0o700), (False, 0o600)}


def test_a_disk_full_for_a_while_costs_a_checkpoint_only(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run("whole")
    real, found = os.fsync, []

    def hook(record: RoundRecord) -> None:
        checkpoints = tmp_path / "full" / "checkpoints"
        found.append(sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else [])
        monkeypatch.setattr(os, "fsync", no_space if record.round_num == 2 else real)

    state, (unsaved, unlogged) = run("full", hook)
    assert unsaved.startswith("round 2 could not be saved in")
    assert unsaved.endswith("No space left on device; going on, the next round saves again")
    assert unlogged.endswith(
        "decisions.jsonl: No space left on device; going on, later lines bring these along"
    )
    log = tmp_path / "full" / "decisions.jsonl"
    verify(log)
    rounds = [entry["round"] for entry in read_entries(log) if entry["event"] == "round"]
    assert rounds == [0, 1, 2, 3]
    assert found == [[], [], ["round-00001"], ["round-00001"]]
    assert state.adapter.digest == whole.adapter.digest
    assert result_of(tmp_path / "full")["status"] == "completed"


def no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_stays_full_keeps_the_last_checkpoint(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def hook(record: RoundRecord) -> None:
        monkeypatch.setattr(os, "fsync", no_space if record.round_num >= 2 else real)

    whole, _ = run("whole")
    with pytest.raises(CheckpointError, match="No space left") as caught:
        run("full", hook)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "fsync", real)
    resumed, notices = run("full", **{"run.resume": True})
    assert notices == ["resuming after round 1"]
    assert resumed.adapter.digest == whole.adapter.digest


def test_an_unsaved_round_is_kept_though_the_next_one_fails(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def hook(record: RoundRecord) -> None:
        monkeypatch.setattr(os, "fsync", no_space if record.round_num == 2 else real)
        if record.round_num == 3:
            raise RunFailedError("round 3 failed")

    with pytest.raises(RunFailedError, match="round 3 failed"):
        run("kept", hook)
    names = sorted(path.name for path in (tmp_path / "kept" / "checkpoints").iterdir())
    assert names == ["round-00001", "round-00002"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 200 KiB, where that is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_is_full_ends_the_run_with_one_line(run: Callable, tiny_disk: Path) -> None:
    whole, _ = run("whole")
    filler = tiny_disk / "filler"

    def hook(record: RoundRecord) -> None:
        if record.round_num == 2:
            free = os.statvfs(tiny_disk)
            filler.write_bytes(bytes(free.f_bavail * free.f_frsize))

    with pytest.raises(CheckpointError) as caught:
        run("full", hook, **{"run.output": str(tiny_disk)})
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tiny_disk / "full" / "checkpoints").iterdir()] == ["round-00001"]
    filler.unlink()
    resumed, _ = run("full", **{"run.output": str(tiny_disk), "run.resume": True})
    assert resumed.adapter.digest == whole.adapter.digest


def test_a_run_that_fails_says_why_in_its_result(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(RunFailedError):
        run("lonely", **{"federation.num-clients": 5, "federation.min-clients": 5})
    assert result_of(tmp_path / "lonely")["status"] == "failed"
    assert "usable clients joined" in result_of(tmp_path / "lonely")["reason"]


def test_the_published_folder_names_no_path_and_no_row(
    run: Callable, make_config: Callable, tmp_path: Path
) -> None:
    run("mine", **{"federation.num-rounds": 1})
    folder = run_folder(make_config(plan(tmp_path, "mine")))
    for file in (folder / "adapter").iterdir():
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content
        for private in (b"Return the", b"anna 0?"):
            assert private not in content
    assert b"No differential privacy was applied" in (folder / "adapter" / "README.md").read_bytes()


def test_the_config_in_the_folder_is_the_runs(run: Callable, make_config: Callable, tmp_path: Path) -> None:
    from fedllm.config.recipe import build_config

    run("mine", **{"federation.num-rounds": 1})
    expected = make_config({**plan(tmp_path, "mine"), "federation.num-rounds": 1})
    assert isinstance(expected, RunConfig)
    assert build_config(tmp_path / "mine" / "config.toml", []) == expected


def test_a_run_starts_from_the_adapter_in_its_folder(run: Callable, tmp_path: Path) -> None:
    first, _ = run("first")
    (tmp_path / "second").mkdir()
    shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "second" / "start")
    second, notices = run("second", **{"federation.num-rounds": 1})
    assert "starting from the adapter in start/" in notices
    assert second.records[0].held_out == first.records[-1].held_out, "what it is compared with"
    assert second.adapter.digest != first.adapter.digest


def test_an_adapter_of_another_rank_is_no_start(run: Callable, tmp_path: Path) -> None:
    run("first", **{"federation.num-rounds": 1})
    (tmp_path / "second").mkdir()
    shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "second" / "start")
    with pytest.raises(ConfigError, match="start: an adapter of another base model, rank"):
        run("second", **{"lora.rank": 3})


def test_a_run_that_only_measures_does_no_round(run: Callable, tmp_path: Path) -> None:
    first, _ = run("first", **{"personal.mode": "finetune"})
    (tmp_path / "look").mkdir()
    shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "look" / "start")
    flat = {"evaluation.every": "only", "personal.mode": "finetune"}
    records: list[RoundRecord] = []
    state, _ = run("look", records.append, **flat)
    assert [record.round_num for record in records] == [0]
    assert state.adapter.digest == first.adapter.digest
    assert result_of(tmp_path / "look")["held_out"]["after"]["clients"] == first.records[-1].held_out
    assert not (tmp_path / "look" / "checkpoints").exists()
