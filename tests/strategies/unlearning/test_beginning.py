"""A run that began from the adapter of an earlier one forgets what that one knew as well."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.serverapp.strategy import FedAvg

from clients.client_app import app
from fedllm.adapters.folder import WEIGHTS, load_adapter
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import START, write_left_out
from fedllm.runs.lineage import statement_of_run
from scripts.runtimes.local import local_grid
from strategies.run import run_federation
from strategies.unlearning.guarantee import Guarantee, guarantee_of
from strategies.unlearning.replay import begin_replay, replayed_config
from tests.strategies.unlearning.conftest import done

GONE = "cleo"
FEW = {"federation.num-rounds": 3, "federation.cohort": 2}


@pytest.fixture
def run(config_of: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., ServerState]:
    """Return a function (name, the run it begins from, clients left out) -> the state at its end."""

    def do(name: str, begins: str = "", left_out: tuple[str, ...] = ()) -> ServerState:
        folder = tmp_path / name
        folder.mkdir()
        if begins:
            shutil.copytree(tmp_path / begins / "adapter", folder / START)
        if left_out:
            write_left_out(folder, left_out)
        return done(config_of(name, **FEW))

    return do


def forgotten(folder: Path, name: str) -> tuple[Guarantee, ServerState]:
    guarantee = guarantee_of(folder, GONE)
    begin_replay(folder, GONE, guarantee, name)
    return guarantee, done(replayed_config(folder, name))


def test_a_later_run_is_done_again_from_an_adapter_that_has_forgotten(run: Callable, tmp_path: Path) -> None:
    run("first")
    run("second", "first")
    found = guarantee_of(tmp_path / "second", GONE)
    assert (found.kind, found.earlier) == ("D", "first")
    assert "unlearn it from that one first" in found.refused["A"]

    forgotten(tmp_path / "first", "first-without")
    guarantee, state = forgotten(tmp_path / "second", "second-without")
    assert (guarantee.kind, guarantee.first_round, guarantee.num_again) == ("A", 1, 3)
    assert "one that has forgotten it takes its place" in guarantee.why
    assert "first-without" not in (tmp_path / "second-without" / "unlearning.json").read_text()

    run("never", left_out=(GONE,))
    assert run("never-second", "never", left_out=(GONE,)).adapter.digest == state.adapter.digest
    parents = [parent["digest"] for parent in statement_of_run(tmp_path / "second-without").parents]
    assert len(parents) == 2
    assert guarantee_of(tmp_path / "second-without", "anna").kind == "D"  # anna is in both


def test_what_began_without_the_client_needs_nothing_else(run: Callable, tmp_path: Path) -> None:
    run("first", left_out=(GONE,))
    run("second", "first")
    guarantee = guarantee_of(tmp_path / "second", GONE)
    assert (guarantee.kind, guarantee.instead) == ("A", "")


def test_an_adapter_of_no_known_run_may_know_the_client(run: Callable, tmp_path: Path) -> None:
    run("first", left_out=(GONE,))
    run("second", "first")
    shutil.rmtree(tmp_path / "first")
    assert "not beside it" in guarantee_of(tmp_path / "second", GONE).refused["A"]
    (tmp_path / "second" / START / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        guarantee_of(tmp_path / "second", GONE)


def test_two_runs_that_changed_nothing_end_the_search(run: Callable, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run(name)
        shutil.copytree(tmp_path / "first" / "adapter", tmp_path / name / START)
    shutil.rmtree(tmp_path / "second" / "adapter")
    shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "second" / "adapter")
    assert guarantee_of(tmp_path / "second", GONE).kind == "D"


@pytest.mark.parametrize("given", ["start", "stock"])
def test_what_a_program_gave_no_run_repeats(
    given: str, run: Callable, config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run("first")
    config = config_of("second", **FEW, **{"aggregation.read-out": "factor-mean"})
    gives = {"start": load_adapter(tmp_path / "first" / "adapter").state, "stock": FedAvg()}
    run_federation(config, local_grid(config, app), **{given: gives[given]})
    log = (tmp_path / "second" / "decisions.jsonl").read_text().splitlines()
    assert len(json.loads(log[0])["given"]) == 1
    assert "by a program" in guarantee_of(tmp_path / "second", GONE).refused["A"]
