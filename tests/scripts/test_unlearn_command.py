"""`fedllm unlearn`: what it says and does for each class, and that a repeated call goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedllm.adapters.folder import load_adapter
from fedllm.errors import ConfigError
from fedllm.runs.folder import read_left_out
from fedllm.runs.unlearning import read_unlearning
from scripts import cli
from scripts.commands import unlearn_command
from strategies.unlearning.guarantee import Guarantee


def call(*words: str) -> tuple[str, dict[str, Any]]:
    result = CliRunner().invoke(cli.app, ["unlearn", *words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stderr, json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write four rows for each of three clients."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"prompt": f"{name} {row}?", "response": f"the {row} of {name}", "client": name}
        for name in ("anna", "ben", "cleo")
        for row in range(4)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def finished(
    rows: Path, make_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Do a run of three rounds, one client in each."""
    folder = tmp_path_factory.mktemp("runs")
    words = {
        "model.name": make_model_folder(),
        "data.source": rows,
        **{"federation.num-clients": 3, "federation.cohort": 1, "federation.num-rounds": 3},
        **{"lora.rank": 2, "train.local-steps": 1, "train.batch-size": 2, "train.max-length": 32},
    }
    keys = [f"{key}={value}" for key, value in words.items()]
    done = CliRunner().invoke(cli.app, ["run", *keys, "--out", str(folder), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def last_client(run: Path) -> str:
    """Return the one whose first turn came last."""
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    turns: dict[str, int] = {}
    for record in records:
        for name in record["asked"]:
            turns.setdefault(name, record["round"])
    return max(turns, key=lambda name: turns[name])


def test_unlearning_makes_a_new_run_and_a_second_call_finds_it_done(run: Path) -> None:
    before = load_adapter(run / "adapter").state.digest
    client = last_client(run)
    _, report = call(str(run), "--client", client)
    assert (report["kind"], report["folder"]) == ("A", str(run.parent / "run-unlearned"))
    adapter = run.parent / "run-unlearned" / "adapter"
    digest = load_adapter(adapter).state.digest
    assert digest != before == load_adapter(run / "adapter").state.digest
    assert "class A" in (adapter / "README.md").read_text()
    _, again = call(str(run), "--client", client)
    assert again == report
    assert load_adapter(adapter).state.digest == digest


def test_a_dry_run_says_what_could_be_promised_and_does_nothing(run: Path) -> None:
    _, report = call(str(run), "--client", last_client(run), "--dry-run")
    assert (report["kind"], report["folder"]) == ("A", None)
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def test_rows_are_forgotten_and_their_client_stays(run: Path, rows: Path, tmp_path: Path) -> None:
    client = last_client(run)
    lines = [line for line in rows.read_text().splitlines() if json.loads(line)["client"] == client]
    (tmp_path / "forget.jsonl").write_text(lines[1] + "\n")
    _, report = call(str(run), "--rows", str(tmp_path / "forget.jsonl"), "--name", "less")
    assert report["kind"] == "A"
    folder = run.parent / "less"
    assert load_adapter(folder / "adapter").state.digest != load_adapter(run / "adapter").state.digest
    assert client in (folder / "rounds.jsonl").read_text()
    assert not (folder / "left-out.json").exists()


def test_a_server_does_the_rounds_of_a_prepared_run(run: Path) -> None:
    client = last_client(run)
    words = [str(run), "--client", client, "--prepare"]
    told = CliRunner().invoke(cli.app, ["unlearn", *words], catch_exceptions=False).stdout
    folder = run.parent / "run-unlearned"
    assert "fedllm serve" in told
    assert "run.name=run-unlearned" in told
    assert not (folder / "adapter").exists()
    assert read_left_out(folder) == {client}
    keys = ["run.name=run-unlearned", "--out", str(run.parent), "--resume", "--json"]
    CliRunner().invoke(cli.app, ["run", str(run / "config.toml"), *keys], catch_exceptions=False)
    prepared = load_adapter(folder / "adapter").state.digest
    call(str(run), "--client", client, "--name", "at-once")
    assert load_adapter(run.parent / "at-once" / "adapter").state.digest == prepared


def test_rows_gone_at_the_site_leave_the_client_in_the_run(run: Path) -> None:
    client = last_client(run)
    _, report = call(str(run), "--client", client, "--rows-gone", "--prepare")
    assert report["kind"] == "A"
    assert not (run.parent / "run-unlearned" / "left-out.json").exists()


def test_rows_that_nobody_has_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "forget.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ConfigError, match=r"no client of .* has any of these rows"):
        call(str(run), "--rows", str(tmp_path / "forget.jsonl"))


@pytest.mark.parametrize("words", [(), ("--client", "anna", "--rows", "x.jsonl")])
def test_either_a_client_or_rows_are_named(words: tuple[str, ...], run: Path) -> None:
    with pytest.raises(ConfigError, match="either the --client to forget, or a file"):
        call(str(run), *words)


def test_a_run_that_chose_by_losses_forgets_approximately(run: Path) -> None:
    recipe = run / "config.toml"
    recipe.write_text(recipe.read_text().replace('"uniform"', '"power-of-choice"', 1))
    said, found = call(str(run), "--client", "anna")
    assert found["kind"] == "D"
    told = read_unlearning(Path(found["folder"]))
    assert told is not None
    assert told.method == "ascent"
    assert told.reason.startswith("not A: federation.selection")
    assert told.guarantee in said


def test_a_person_reads_the_class_and_why_none_is_stronger() -> None:
    refused = {"A": "losses", "B": "no budget", "C": "one adapter"}
    lines = unlearn_command.lines_of(Guarantee(kind="D", why="nothing else", refused=refused))
    assert lines == [
        "class D: approximate, without any guarantee (nothing else)",
        "  not class A: losses",
        "  not class B: no budget",
        "  not class C: one adapter",
    ]
