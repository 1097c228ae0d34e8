import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.recipe import build_config
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.runs.folder import (
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


def test_a_run_folder_holds_the_recipe_that_repeats_the_run(tmp_path: Path) -> None:
    config = config_in(
        tmp_path, seed=7, **{"lora.target-modules": "q_proj,v_proj", "train.learning-rate": 3e-4}
    )
    folder = open_run_folder(config)
    assert folder == run_folder(config) == (tmp_path / "mine").resolve()
    assert not (folder / "config.toml").exists(), "a resume that is refused leaves the earlier one"
    describe_run(folder, config)
    assert build_config(folder / "config.toml", []) == config
    assert read_keys(folder) == config.to_flat()
    assert json.loads((folder / "environment.json").read_text()) == environment()


@pytest.mark.parametrize("damage", [None, b"seed = ", b"\xff"])
def test_a_configuration_that_is_damaged_or_absent_is_no_run(damage: bytes | None, tmp_path: Path) -> None:
    if damage is not None:
        (tmp_path / "config.toml").write_bytes(damage)
    with pytest.raises(ConfigError, match="not a run folder"):
        read_keys(tmp_path)


def test_an_environment_names_versions_and_no_host_or_path(tmp_path: Path) -> None:
    import getpass
    import socket

    text = json.dumps(environment())
    assert {"python", "flwr", "torch", "fedllm"} <= environment().keys()
    for private in (socket.gethostname(), getpass.getuser(), str(Path.home())):
        assert private not in text


def test_an_earlier_run_is_continued_only_on_purpose(tmp_path: Path) -> None:
    folder = open_run_folder(config_in(tmp_path))
    open_run_folder(config_in(tmp_path))  # it has no checkpoint yet
    (folder / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds an earlier run: add --resume") as caught:
        open_run_folder(config_in(tmp_path))
    assert "\n" not in str(caught.value)
    assert open_run_folder(config_in(tmp_path, **{"run.resume": True})) == folder


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot write .*; set run\.output") as caught:
        open_run_folder(config_in(tmp_path))
    assert "\n" not in str(caught.value)


def test_rounds_are_one_line_each_however_often_they_are_written(tmp_path: Path) -> None:
    records = [RoundRecord(round_num=number) for number in range(3)]
    for _ in range(2):
        write_rounds(tmp_path, records)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]
    write_result(tmp_path, {"status": "completed"})
    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "completed"}
