"""The last step of a run with personal.mode = finetune: what is asked, kept and told, once."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from clients.client_app import app
from fedllm.adapters.folder import load_adapter
from fedllm.errors import CheckpointError
from fedllm.messages import ClientAtHome, ClientFailure
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import read_rounds
from scripts.console import joining_line
from scripts.runtimes.local import local_grid
from strategies import run as run_module
from strategies.exchange.after_rounds import train_on_at_home
from strategies.exchange.validation import check_at_home
from strategies.first_state import first_state
from strategies.rounds import next_round
from strategies.run import run_federation
from strategies.session import Watch

AT_HOME = {"personal.mode": "finetune", "personal.steps": 4}
# Two rows of anna's five, so that one chooses and one measures.
HELD_OUT = {"data.held-out-fraction": 0.4, "federation.num-rounds": 1, "train.learning-rate": 1e-2}
NAMES = ["anna", "ben", "cleo", "dora"]


@pytest.fixture
def run(make_config: Callable, tmp_path: Path) -> Callable[..., tuple[ServerState, Path, list[str]]]:
    """Return a function (name, **flat overrides) that does a run or goes on with it."""

    def do(name: str, **flat: Any) -> tuple[ServerState, Path, list[str]]:
        notices: list[str] = []
        fixed = {"run.output": str(tmp_path), "run.name": name, "run.resume": True}
        config = make_config({**fixed, **HELD_OUT, **flat})
        state = run_federation(config, local_grid(config, app, num_nodes=2), Watch(notice=notices.append))
        return state, tmp_path / name, notices

    return do


def result_of(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


def own_adapters(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in sorted((folder / "private").glob("*/*/home"))}


def test_each_client_keeps_an_adapter_and_tells_its_losses(run: Callable) -> None:
    state, folder, _ = run("home", **AT_HOME)
    found = result_of(folder)["at_home"]
    assert list(found["clients"]) == list(own_adapters(folder)) == NAMES
    (_, last) = read_rounds(folder)
    assert last.at_home is not None
    assert last.at_home.to_result() == found
    gained = [name for name, one in found["clients"].items() if one["home"] < one["alone"]]
    assert found["gained"] == len(gained) / 4
    assert f"{len(gained)} of 4 clients better than alone" in joining_line(found)
    for name, path in own_adapters(folder).items():
        assert path.stat().st_mode & 0o777 == 0o700
        own, one = load_adapter(path).state, found["clients"][name]
        assert (own.digest == state.adapter.digest) is (one["steps"] == 0)
        assert f"{one['home']:.4f}" in (path / "README.md").read_text()
        assert one["home"] < one["shared"] or not one["steps"]


def test_it_changes_nothing_shared_and_keeps_what_the_base_gained(run: Callable) -> None:
    stack = {"aggregation.read-out": "stack"}
    plain, plain_folder, _ = run("plain", **stack)
    state, folder, _ = run("home", **AT_HOME, **stack)
    assert state.adapter.digest == plain.adapter.digest
    assert "at_home" not in result_of(plain_folder)
    published = load_adapter(folder / "adapter").state.layout
    assert published.rank > state.adapter.layout.rank
    assert {load_adapter(path).state.layout.rank for path in own_adapters(folder).values()} == {
        published.rank
    }


def test_nothing_is_told_where_the_plan_withholds_it(run: Callable) -> None:
    private = {"privacy.epsilon": 50.0, "privacy.unit": "client", "privacy.delta": 1e-3}
    _, spent_folder, _ = run("private", **private)
    _, folder, notices = run("home", **AT_HOME, **private)
    assert list(own_adapters(folder)) == NAMES
    assert "at_home" not in result_of(folder)
    assert result_of(folder)["privacy"] == result_of(spent_folder)["privacy"], "nothing is charged for it"
    assert any("no loss of that leaves" in line for line in notices)


def test_a_killed_run_does_it_when_it_goes_on_and_never_twice(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = result_of(run("whole", **AT_HOME)[1])["at_home"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "LAST_STEPS", (_raise,))
        with pytest.raises(CheckpointError):
            run("killed", **AT_HOME)
    state, folder, _ = run("killed", **AT_HOME)
    assert result_of(folder)["at_home"] == expected
    asked: list[str] = []
    monkeypatch.setattr("clients.handlers.adapt_clients", lambda *_: asked.append("adapt"))
    _, folder, _ = run("killed", **AT_HOME)
    assert result_of(folder)["at_home"] == expected
    assert asked == []
    assert state.records[-1].at_home is not None


def _raise(*_: object) -> ServerState:
    raise CheckpointError("killed")


def test_an_answer_of_another_form_is_refused_alone(open_run: Callable, make_config: Callable) -> None:
    left = ["text"]

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.message_type == "query.adapt" and left:
            reply.content["metrics"][left.pop()] = [1.0]
        return [reply]

    run = open_run(make_config({**HELD_OUT, **AT_HOME}), tamper=tamper)
    state = train_on_at_home(run.session, next_round(run.session, first_state(run.session))[0])
    assert list(state.records[-1].at_home.home) == NAMES[1:]
    assert any("did not train on at home: the reply's client list or metrics" in line for line in run.notices)


def test_a_node_that_cannot_be_asked_is_named(
    open_run: Callable, make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(make_config({**HELD_OUT, **AT_HOME}))
    state, _ = next_round(run.session, first_state(run.session))
    away, *others = run.session.transport.node_ids()
    monkeypatch.setattr(type(run.session.transport), "node_ids", lambda _: others)
    state = train_on_at_home(run.session, state)
    assert sorted(run.session.by_node(state.records[-1].at_home.home)) == others
    assert f"node {away} did not train on at home: it is away or busy" in run.notices


@pytest.mark.parametrize(
    "change", [{"home": -1.0}, {"alone": math.nan}, {"shared": math.inf}, {"steps": 9}, {"home": 1e9}]
)
def test_a_number_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    honest = ClientAtHome(client_id="anna", alone=2.0, shared=1.5, home=1.0, steps=8)
    assert check_at_home(honest, 8) is honest
    assert isinstance(check_at_home(replace(honest, **change), 8), ClientFailure)
