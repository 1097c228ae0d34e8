import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.keys import ModelConfig
from fedllm.config.recipe import build_config
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.runs.folder import (
    STARTER,
    WRITER,
    describe_run,
    environment,
    open_run_folder,
    read_keys,
    run_folder,
    write_result,
    write_rounds,
)
from fedllm.runs.records import RoundRecord


def config_in(tmp_path: Path, **changes: Any) -> RunConfig:
    return RunConfig.from_flat({"run.output": str(tmp_path), "run.name": "mine", **changes})


def enter(config: RunConfig, lock: str = WRITER) -> None:
    with open_run_folder(config, lock):
        pass


def test_a_run_folder_holds_the_recipe_that_repeats_the_run(tmp_path: Path) -> None:
    config = config_in(
        tmp_path, seed=7, **{"lora.target-modules": "q_proj,v_proj", "train.learning-rate": 3e-4}
    )
    with open_run_folder(config) as opened:
        folder = opened
    assert folder == run_folder(config) == (tmp_path / "mine").resolve()
    assert not (folder / "config.toml").exists(), "a resume that is refused leaves the earlier one"
    describe_run(folder, config)
    assert build_config(folder / "config.toml", []) == config
    assert read_keys(folder) == config.to_flat()
    assert json.loads((folder / "environment.json").read_text()) == environment(config.model)


@pytest.mark.parametrize("damage", [None, b"seed = ", b"\xff"])
def test_a_configuration_that_is_damaged_or_absent_is_no_run(damage: bytes | None, tmp_path: Path) -> None:
    if damage is not None:
        (tmp_path / "config.toml").write_bytes(damage)
    with pytest.raises(ConfigError, match="not a run folder"):
        read_keys(tmp_path)


def test_an_environment_names_versions_and_no_host_or_path(tmp_path: Path) -> None:
    import getpass
    import socket

    found = environment(ModelConfig(name=str(tmp_path), device="cpu"))
    text = json.dumps(found)
    assert {"python", "flwr", "torch", "fedllm"} <= found.keys()
    for private in (socket.gethostname(), getpass.getuser(), str(Path.home())):
        assert private not in text


def test_a_run_without_a_complete_round_is_begun_anew(tmp_path: Path) -> None:
    for resume in (False, True):
        with open_run_folder(config_in(tmp_path, **{"run.resume": resume})) as folder:
            # as a kill inside the first checkpoint leaves it
            (folder / "checkpoints" / ".round-00001-abc").mkdir(parents=True, exist_ok=True)


def test_an_earlier_run_is_continued_only_on_purpose(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    round_folder = run_folder(config) / "checkpoints" / "round-00001"
    round_folder.mkdir(parents=True)
    (round_folder / "state.json").write_text(json.dumps({"config": config.to_flat()}))
    with pytest.raises(ConfigError, match="holds an earlier run: add --resume") as caught:
        enter(config)
    assert "\n" not in str(caught.value)
    enter(config_in(tmp_path, **{"run.resume": True}))
    with pytest.raises(ConfigError, match=r"train\.local-steps was 4, now 5"):
        enter(config_in(tmp_path, **{"run.resume": True, "train.local-steps": 5}))


def test_an_adapter_without_checkpoints_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"holds an adapter and no checkpoint .* run\.name"):
            enter(config_in(tmp_path, **{"run.resume": resume}))


@pytest.mark.parametrize("lock", [WRITER, STARTER])
def test_a_folder_is_held_by_one_writer_while_it_lives(lock: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    script = f"""
import sys
from pathlib import Path
from fedllm.files import locked
with locked(Path({str(tmp_path / "mine" / lock)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process is doing this run") as caught:
            enter(config_in(tmp_path), STARTER)
        assert "\n" not in str(caught.value)
        other.kill()
    enter(config_in(tmp_path), STARTER)


def test_a_starter_and_its_writer_hold_one_folder_together(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with open_run_folder(config, STARTER), open_run_folder(config):
        for lock in (STARTER, WRITER):
            with pytest.raises(ConfigError, match="another process"):
                enter(config, lock)


def test_a_refused_starter_leaves_the_writers_lock_alone(tmp_path: Path) -> None:
    """The process that the first starter is about to start takes that lock: nobody may hold it meanwhile."""
    config = config_in(tmp_path)
    with open_run_folder(config, STARTER) as folder:
        (folder / WRITER).unlink()
        with pytest.raises(ConfigError, match="another process"):
            enter(config, STARTER)
        assert not (folder / WRITER).exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot write .*; set run\.output") as caught:
        enter(config_in(tmp_path))
    assert "\n" not in str(caught.value)


def test_rounds_are_one_line_each_however_often_they_are_written(tmp_path: Path) -> None:
    records = [RoundRecord(round_num=number) for number in range(3)]
    for _ in range(2):
        write_rounds(tmp_path, records)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]
    write_result(tmp_path, {"status": "completed"})
    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "completed"}
