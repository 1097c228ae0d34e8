"""`fedllm pipeline` with real federations of a tiny model: first version, new rows, figures, refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fedllm.errors import ConfigError
from fedllm.files import locked
from fedllm.identity import new_key, public_text
from fedllm.registry.registry import Registry
from scripts.commands.pipeline_command import open_pipeline, pipeline
from scripts.console import Console
from scripts.pipeline.settings import read_settings

RECIPE = """
[model]
name = "{model}"
device = "cpu"
[data]
source = "rows.jsonl"
held-out-fraction = 0.3
[lora]
rank = 2
target-modules = "q_proj,v_proj"
[federation]
num-clients = 3
num-rounds = 2
[train]
local-steps = 4
learning-rate = 0.02
max-length = 32
"""
PIPELINE = """
[run]
recipe = "recipe.toml"
[registry]
folder = "registry/tiny"
key = "site.key"
[trigger]
new-rows = 9
[drift]
least = 5.0
[metrics]
file = "tiny.prom"
"""


def write_rows(folder: Path, number: int) -> None:
    lines = [
        {"prompt": f"question {n}", "response": f"answer {n % 4}", "client": "abc"[n % 3]}
        for n in range(number)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path, make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a pipeline of three clients with eight rows each, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model=make_model_folder()))
    (tmp_path / "pipeline.toml").write_text(PIPELINE)
    write_rows(tmp_path, 24)
    return tmp_path


def test_versions_follow_from_rows(folder: Path, capsys: pytest.CaptureFixture) -> None:
    key = new_key(folder / "site.key")
    pipeline(folder / "pipeline.toml", once=True)
    pipeline(folder / "pipeline.toml", once=True)
    registry = Registry(folder / "registry" / "tiny")
    assert [version.aliases for version in registry.versions()] == [("production",)], "no trigger, no run"
    write_rows(folder, 33)
    pipeline(folder / "pipeline.toml", once=True)
    assert "run-0002 begins: 9 new rows" in capsys.readouterr().out
    assert (folder / "pipeline" / "run-0002" / "start" / "adapter.sig.json").exists()
    registry.verify([public_text(key)])
    if len(registry.versions()) == 2:  # else a gate kept it out, and the log says so
        first, second = registry.versions()
        assert second.statement.parents == ({"relation": "retrained-from", "digest": first.weights},)
    families = text_string_to_metric_families((folder / "tiny.prom").read_text())
    values = {one.name: one.value for family in families for one in family.samples}
    assert (values["fedllm_runs_total"], values["fedllm_looks_total"]) == (2, 3)


def test_a_pipeline_that_another_process_does_is_refused(folder: Path) -> None:
    new_key(folder / "site.key")
    (folder / "pipeline").mkdir()
    with (
        locked(folder / "pipeline" / ".lock"),
        pytest.raises(ConfigError, match="another process does this pipeline"),
    ):
        pipeline(folder / "pipeline.toml", once=True)


def test_a_server_that_has_no_adapter_is_refused(folder: Path) -> None:
    new_key(folder / "site.key")
    with (folder / "recipe.toml").open("a") as recipe:
        recipe.write('[secure]\nmethod = "shares"\n[wire]\ncodec = "fp32"\n')
    with pytest.raises(ConfigError, match=r"recipe.toml: .*shares"):
        pipeline(folder / "pipeline.toml", once=True)


def test_an_audit_of_rows_that_are_elsewhere_is_refused(folder: Path) -> None:
    new_key(folder / "site.key")
    text = PIPELINE.replace("[registry]", 'runtime = "deployment"\n[registry]')
    (folder / "pipeline.toml").write_text(text + "[gates]\nextraction = 0.0\n")
    with pytest.raises(ConfigError, match=r"pipeline.toml: .*need the rows on this machine"):
        pipeline(folder / "pipeline.toml", once=True)


def test_the_epsilon_of_a_run_is_that_of_its_recipe_now(folder: Path) -> None:
    new_key(folder / "site.key")
    opened = open_pipeline(read_settings(folder / "pipeline.toml"), Console(quiet=True))
    assert opened.epsilon_of_run() == 0.0
    with (folder / "recipe.toml").open("a") as recipe:
        recipe.write("[privacy]\nepsilon = 4.0\n")
    assert opened.epsilon_of_run() == 4.0


def test_a_missing_key_says_how_to_make_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"site.key: .*`fedllm keys new` makes one"):
        pipeline(folder / "pipeline.toml", once=True)
