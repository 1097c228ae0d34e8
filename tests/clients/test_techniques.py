"""Techniques: which a run has, in which order, and that a new one is a value with steps of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from safetensors.torch import load_file

from clients import techniques
from clients.data_holder import DataHolder
from clients.process import Process
from clients.stock import train_for_stock
from clients.technique import ClientWork, NodeRound, Technique, Works, start_of
from clients.techniques import techniques_of
from clients.train import train_clients
from fedllm.adapters.layout import initial_adapter
from fedllm.errors import ConfigError
from fedllm.wire.stock import write_plain
from tests.builders import train_request

SCAFFOLD = {"train.control-variates": True, "aggregation.read-out": "factor-mean"}
EXAMPLE = {"privacy.epsilon": 8.0}
CENTRAL = {**EXAMPLE, "privacy.unit": "client"}


@pytest.fixture
def open_one(write_rows: Callable, make_config: Callable, tmp_path: Any) -> Callable[..., DataHolder]:
    """Return a function (**flat) -> a holder of one client with a state folder of its own."""

    def start(**flat: Any) -> DataHolder:
        config = make_config(write_rows("rows.jsonl", {"anna": 9}), **{"federation.num-clients": 1, **flat})
        return Process().open(config.to_flat(), {"server-paths": True, "state-path": str(tmp_path / "state")})

    return start


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({}, []),
        ({"aggregation.preset": "fedsa"}, ["local B"]),
        (SCAFFOLD, ["control variates"]),
        ({**SCAFFOLD, "personal.mode": "dual"}, ["control variates", "personal adapter"]),
        (EXAMPLE, ["private rows"]),
        (CENTRAL, ["central noise"]),
        ({**CENTRAL, "privacy.trust": "local"}, ["local noise"]),
    ],
)
def test_a_run_has_the_techniques_of_its_plan(
    flat: dict[str, Any], expected: list[str], open_one: Callable
) -> None:
    holder = open_one(**flat)
    found = techniques_of(holder.plan, holder.engine.layout)
    assert [technique.name for technique in found] == expected


def test_steps_that_are_left_out_do_nothing() -> None:
    nothing, start_P = Technique(name="nothing"), torch.ones(3)
    assert start_of([nothing], start_P, {}) is start_P
    assert nothing.prepare(None, ()) == nothing.after(None, ()) == ()
    measured: dict[str, Any] = {}
    assert nothing.measure(None, [], {}, measured) is measured


def test_control_variates_need_a_server_that_sends_c(open_one: Callable) -> None:
    holder = open_one(**SCAFFOLD)
    with pytest.raises(ConfigError, match=r"train\.control-variates"):
        train_clients(holder, train_request(holder, "anna"))


@pytest.mark.parametrize("flat", [SCAFFOLD, {"aggregation.preset": "fedsa"}, {"personal.mode": "dual"}])
def test_a_stock_strategy_gets_no_technique_that_keeps(flat: dict[str, Any], open_one: Callable) -> None:
    holder = open_one(**flat)
    content = RecordDict({"arrays": write_plain(initial_adapter(holder.engine.layout, 0))})
    with pytest.raises(ConfigError, match="own rounds"):
        train_for_stock(holder, content)


RESIDUAL = "residual"


def sparsify(size: int, number: int) -> Technique:
    """Return a technique that sends the `number` largest values and keeps the rest for the next round."""

    def sent_of(work: ClientWork) -> ClientWork:
        whole_P = work.sent.delta + work.kept.get(RESIDUAL, torch.zeros(size))
        sent_P = torch.zeros(size)
        place = whole_P.abs().topk(number).indices
        sent_P[place] = whole_P[place]
        return work.sending(delta=sent_P).keeping(RESIDUAL, whole_P - sent_P)

    def after(this_round: NodeRound, works: Works) -> Works:
        return [sent_of(work) for work in works]

    return Technique(name="sparse updates", kept={RESIDUAL: size}, after=after)


def test_a_new_technique_is_one_value(open_one: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = open_one(**{"train.token-budget": 1})
    drawn = holder.plan.config.train.local_steps * holder.plan.config.train.batch_size
    asked = [
        train_request(holder, "anna", round_num=number + 1, drawn={"anna": number * drawn})
        for number in range(3)
    ]
    whole = [train_clients(holder, request)[0].delta for request in asked]
    technique = sparsify(holder.engine.layout.size, 5)
    monkeypatch.setattr(techniques, "techniques_of", lambda plan, layout: (technique,))
    sparse = [train_clients(holder, request)[0].delta for request in asked]
    assert [int(delta.count_nonzero()) for delta in sparse] == [5, 5, 5]
    (file,) = sorted(holder.store.folder.glob(f"anna/*{3 * drawn}.safetensors"))
    torch.testing.assert_close(sum(sparse) + load_file(file)[RESIDUAL], sum(whole))
