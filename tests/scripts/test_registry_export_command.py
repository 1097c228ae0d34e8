"""`fedllm registry export --to mlflow`: MLflow's own client finds, tags and downloads what was exported."""

import json
import sys
from pathlib import Path

import pytest

from fedllm.identity import public_text
from fedllm.registry.registry import Registry
from fedllm.signing.statement import read_statement
from scripts.cli import app
from scripts.command_line import run_app
from tests.registry.conftest import KEY, finished_run


def make_clinic(folder: Path) -> Registry:
    """Return a registry of two versions: the first marked, the second made from it and in production."""
    registry = Registry(folder / "clinic")
    first = registry.add(
        finished_run(folder / "first", 1), KEY, {"better": {"value": 1, "limit": 0, "passed": True}}
    )
    registry.promote(registry.add(finished_run(folder / "second", 2, start=first.folder), KEY).number)
    registry.mark(1, "withdrawn")
    return registry


def exported(registry: Registry, uri: str) -> int:
    words = ["registry", "export", str(registry.folder), "--to", "mlflow", "--uri", uri, "--json"]
    return run_app(app, words, name="fedllm")


@pytest.mark.filterwarnings("ignore")  # of other people's packages
def test_mlflows_own_client_reads_what_was_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where MLflow keeps artifacts by default
    registry, uri = make_clinic(tmp_path), f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):  # the second time it is there already
        assert exported(registry, uri) == 0
        assert json.loads(capsys.readouterr().out) == {"model": "clinic", "versions": {"1": "1", "2": "2"}}
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert len(client.search_model_versions("name = 'clinic'")) == 2
    current = client.get_model_version_by_alias("clinic", "production")
    assert current.tags["fedllm.version"] == "2"
    assert json.loads(current.tags["fedllm.parents"])[0]["digest"] == registry.version(1).weights
    assert "anna" not in json.dumps(current.tags)
    first = client.get_model_version("clinic", "1")
    assert first.tags["fedllm.marked"] == "withdrawn"
    assert json.loads(first.tags["fedllm.gates"])["better"]["passed"]
    got = mlflow.artifacts.download_artifacts(
        artifact_uri=current.source, dst_path=str(tmp_path / "got"), tracking_uri=uri
    )
    assert read_statement(Path(got), [public_text(KEY)]) == registry.version(2).statement
    other = Registry(tmp_path / "other" / "clinic")  # of the same name, so that MLflow counts on
    other.add(finished_run(tmp_path / "third", 3), KEY)
    assert exported(other, uri) == 0
    assert json.loads(capsys.readouterr().out)["versions"] == {"1": "3"}


def test_an_absent_package_and_another_target_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_clinic(tmp_path)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert exported(registry, "") == 2
    assert "pip install 'fedllm[mlflow]'" in capsys.readouterr().err
    assert run_app(app, ["registry", "export", str(registry.folder), "--to", "wandb"], name="fedllm") == 2
    assert "--to wandb: there is mlflow" in capsys.readouterr().err
