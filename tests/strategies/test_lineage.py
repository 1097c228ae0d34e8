"""What a finished run says of how its adapter came about, and whether that can be signed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.client_app import app
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError, IntegrityError, PolicyError
from fedllm.identity import new_key, public_text
from fedllm.models.files import content_digest
from fedllm.plan.run_plan import resolve
from fedllm.runs.lineage import adapter_digest, statement_of_run
from fedllm.signing.statement import payload_of, read_statement, sign_adapter
from scripts.runtimes.local import local_grid
from strategies.run import run_federation


def run(config: RunConfig) -> Path:
    run_federation(config, local_grid(config, app, num_nodes=2))
    return Path(config.run.output) / config.run.name


def config_in(make_config: Callable, folder: Path, **changes: object) -> RunConfig:
    one = {"run.output": str(folder), "federation.num-rounds": 1, "run.purpose": "triage"}
    config: RunConfig = make_config({**one, **changes})
    return config


def test_a_run_says_how_its_adapter_came_about(make_config: Callable, tmp_path: Path) -> None:
    config = config_in(make_config, tmp_path, **{"run.name": "ward"})
    folder, key = run(config), new_key(tmp_path / "key")
    (folder / "privacy.json").write_text('{"epsilon": 2.5, "delta": 1e-05}')
    found = statement_of_run(folder)
    assert found.base["digest"] == content_digest(Path(config.model.name))
    assert (found.run["plan"], found.clients["number"]) == (resolve(config).digest, 4)
    assert (found.name, found.consent["purpose"], found.epsilon) == ("ward", "triage", 2.5)
    assert (found.parents, found.unlearning) == ((), None)
    signed = sign_adapter(folder / "adapter", found, key)
    assert read_statement(folder / "adapter", [public_text(key)]) == signed
    text = payload_of(signed).decode()
    assert not any(said in text for said in ("anna", "ben", str(tmp_path), config.model.name))

    (folder / "adapter" / "README.md").write_text("# Another card\n")
    with pytest.raises(IntegrityError, match=r"README.md: changed"):
        statement_of_run(folder)


def test_parents_are_named_by_their_weights(make_config: Callable, tmp_path: Path) -> None:
    first = run(config_in(make_config, tmp_path, **{"run.name": "first"}))
    unsigned = adapter_digest(first / "adapter")
    sign_adapter(first / "adapter", statement_of_run(first), new_key(tmp_path / "key"))
    second = config_in(make_config, tmp_path, **{"run.name": "second"})
    shutil.copytree(first / "adapter", tmp_path / "second" / "start")
    folder = run(second)
    (folder / "unlearning.json").write_text(json.dumps({"parent": unsigned, "class": "A"}))
    assert statement_of_run(folder).unlearning == {"parent": unsigned, "class": "A"}
    assert [parent["relation"] for parent in statement_of_run(folder).parents] == [
        "retrained-from",
        "unlearned-from",
    ]
    # However often the earlier adapter was signed, before or after.
    assert {parent["digest"] for parent in statement_of_run(folder).parents} == {unsigned}
    assert adapter_digest(first / "adapter") == unsigned


def test_a_run_starts_from_no_adapter_that_is_not_trusted(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(config_in(make_config, tmp_path, **{"run.name": "first"}))
    (tmp_path / "site.toml").write_text(
        f'[adapters]\nsigners = ["{public_text(new_key(tmp_path / "key"))}"]\n'
    )
    monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))
    shutil.copytree(first / "adapter", tmp_path / "second" / "start")
    with pytest.raises(PolicyError, match="start: not signed"):
        run(config_in(make_config, tmp_path, **{"run.name": "second"}))


def test_what_is_not_finished_is_not_signed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        statement_of_run(tmp_path)
    (tmp_path / "result.json").write_text('{"status": "failed"}')
    with pytest.raises(ConfigError, match="not a finished run"):
        statement_of_run(tmp_path)
