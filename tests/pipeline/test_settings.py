"""What stands in a pipeline's file, and what is refused in a line that names the file and the key."""

from pathlib import Path

import pytest

from fedllm.errors import CheckpointError, ConfigError
from fedllm.monitoring.drift import Chart
from scripts.pipeline.settings import read_settings
from scripts.pipeline.state import PipelineState, read_state, write_state

LEAST = '[run]\nrecipe = "r.toml"\n[registry]\nkey = "k"\n'


def test_a_short_file_has_every_default(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(LEAST)
    settings = read_settings(tmp_path / "p.toml")
    assert settings.trigger.drift
    assert settings.trigger.every_days == settings.gates.epsilon == "off"
    assert settings.path(settings.run.recipe) == tmp_path / "r.toml", "paths begin at the file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "run.recipe is missing; name a file"),
        ('[run]\nrecipe = "r"\n', "registry.key is missing; name a file"),
        (LEAST + "[trigers]\n", r"unknown table \[trigers\]"),
        ("run = 3\n", r"run must be a table, \[run\]"),
        (LEAST + "[trigger]\nnew-row = 3\n", "unknown key trigger.new-row; there are look-minutes, "),
        (
            LEAST + '[trigger]\nnew-rows = "some"\n',
            "trigger.new-rows = 'some': expected a whole number from 1",
        ),
        (LEAST + "[gates]\nepsilon = 0\n", "gates.epsilon = 0"),
        ("[run\n", "not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError, match=said) as refused:
        read_settings(tmp_path / "p.toml")
    assert "p.toml: " in str(refused.value)
    assert "\n" not in str(refused.value).replace("\\n", "")


def test_a_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    assert read_state(tmp_path) == PipelineState()
    state = PipelineState(step="judge", cycle=3, charts={"anna": Chart(3, 2.5, 0.1, 1.0)}, spent=2.5)
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state.json: damaged"):
        read_state(tmp_path)
