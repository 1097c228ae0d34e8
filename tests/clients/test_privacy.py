"""A client under a privacy plan: its own ledger, its secret, its coins, what it refuses."""

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from clients import train
from clients.data_holder import DataHolder, open_data_holder
from clients.evaluate import evaluate_clients
from clients.privacy import private_job, request_key
from clients.stock import train_for_stock
from clients.train import train_clients
from fedllm.adapters.base_delta import no_base_delta
from fedllm.adapters.layout import initial_adapter
from fedllm.errors import ConfigError, WithheldError
from fedllm.messages import ClientFailure, ClientUpdate, EvaluateRequest, TrainRequest
from fedllm.plan.run_plan import resolve
from fedllm.plan.training import local_training
from fedllm.privacy.accounting import Charge, epsilon_of
from fedllm.wire.stock import write_plain

EXAMPLE = {"privacy.epsilon": 1e4, "privacy.noise-multiplier": 1.0}
CLIENT = {"privacy.epsilon": 1e4, "privacy.noise-multiplier": 1.0, "privacy.unit": "client"}
LOCAL = {**CLIENT, "privacy.trust": "local", "privacy.clip": 0.1}


@pytest.fixture
def open_one(write_rows: Callable, make_config: Callable, tmp_path: Path) -> Callable[..., DataHolder]:
    """Return a function (rows of anna, **flat) -> a holder of two clients with a state folder of its own."""

    def start(number: int = 12, **flat: Any) -> DataHolder:
        file = write_rows(f"rows{number}.jsonl", {"anna": number, "ben": 6})
        config = make_config(file, **{"run.name": f"r{number}", **flat})
        return open_data_holder(
            config.to_flat(), {"server-paths": True, "state-path": str(tmp_path / "state")}
        )

    return start


def request(holder: DataHolder, **changes: Any) -> TrainRequest:
    layout = holder.engine.layout
    values: dict[str, Any] = {
        "round_num": 1,
        "client_ids": ("anna", "ben"),
        "num_drawn": (0, 0),
        "ranks": (layout.rank, layout.rank),
        "adapter": initial_adapter(layout, 0),
        "base_delta": no_base_delta(layout),
        "trained": "b",
        "local_b": False,
        "node_sum": False,
        "training": local_training(holder.plan.config, 1),
        "codec": "fp32",
        "weighting": "examples",
        "seed": 0,
    }
    return TrainRequest(**{**values, **changes})


def deltas(answers: Any) -> dict[str, torch.Tensor]:
    assert all(isinstance(answer, ClientUpdate) for answer in answers)
    return {answer.client_id: answer.delta for answer in answers}


@pytest.mark.parametrize("flat", [EXAMPLE, LOCAL])
def test_a_request_that_comes_again_gets_the_same_answer_and_is_charged_once(
    flat: dict[str, Any], open_one: Callable
) -> None:
    holder = open_one(**flat)
    first, again = (deltas(train_clients(holder, request(holder))) for _ in range(2))
    other = deltas(train_clients(holder, request(holder, round_num=2)))
    ledger = holder.store.folder / "anna" / "privacy-ledger.json"
    for name in ("anna", "ben"):
        assert torch.equal(first[name], again[name])
        assert not torch.allclose(first[name], other[name], rtol=0.1)
    assert len(json.loads(ledger.read_text())) == 2
    secret = holder.store.folder / "noise-secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_another_secret_gives_another_answer(open_one: Callable) -> None:
    holder = open_one(**EXAMPLE)
    first = deltas(train_clients(holder, request(holder)))
    (holder.store.folder / "noise-secret").write_bytes(bytes(32))
    second = deltas(train_clients(holder, request(holder)))
    assert not torch.allclose(first["anna"], second["anna"], rtol=0.1)


def test_a_client_refuses_once_its_own_budget_is_spent_whatever_is_asked(open_one: Callable) -> None:
    one = epsilon_of([Charge(0.5, 1.0, 1)], 1e-5)  # local: opposite updates are two clips apart
    holder = open_one(**{**LOCAL, "privacy.epsilon": one * 1.01})
    deltas(train_clients(holder, request(holder)))
    answers = train_clients(holder, request(holder, round_num=2))
    assert answers == [
        ClientFailure(client_id="anna", code="budget-spent"),
        ClientFailure(client_id="ben", code="budget-spent"),
    ]
    deltas(train_clients(holder, request(holder)))  # what was paid for may be asked for again


def test_a_damaged_ledger_is_no_empty_ledger(open_one: Callable) -> None:
    holder = open_one(**EXAMPLE)
    deltas(train_clients(holder, request(holder)))
    (holder.store.folder / "anna" / "privacy-ledger.json").write_text("{")
    answers = train_clients(holder, request(holder, round_num=2))
    assert answers[0] == ClientFailure(client_id="anna", code="checkpoint")
    assert isinstance(answers[1], ClientUpdate)


@pytest.mark.parametrize("flat", [LOCAL, EXAMPLE])
def test_other_noise_in_a_run_of_the_same_name_is_unrelated_and_charged(
    flat: dict[str, Any], open_one: Callable
) -> None:
    """The same noise in two amounts could be subtracted: 2 r1 - r2 would be the update itself."""
    answers = []
    for noise in (1.0, 2.0):
        holder = open_one(**{**flat, "privacy.noise-multiplier": noise})
        answers.append(deltas(train_clients(holder, request(holder)))["anna"])
    difference = 2 * answers[0] - answers[1]
    assert float(difference.norm()) > 0.5 * float(answers[1].norm())
    assert len(json.loads((holder.store.folder / "anna" / "privacy-ledger.json").read_text())) == 2


@pytest.mark.parametrize("flat", [LOCAL, EXAMPLE])
def test_what_the_plan_did_not_count_is_refused(flat: dict[str, Any], open_one: Callable) -> None:
    holder = open_one(**flat)
    asked = request(holder)
    more = replace(asked.training, steps=asked.training.steps + 1)
    unplanned = {
        "another training": {"training": more},
        "control variates": {"control": asked.adapter},
        "a local B": {"local_b": True, "trained": "both"},
        "counts of tokens": {"weighting": "tokens"},
    }
    for name, changes in unplanned.items():
        with pytest.raises(ConfigError, match=f"does not cover what the server asks for: {name}$"):
            train_clients(holder, request(holder, **changes))
    assert not (holder.store.folder / "anna").exists()


def test_masks_of_dropout_come_from_the_secret_under_dp_sgd(open_one: Callable) -> None:
    holder = open_one(**EXAMPLE)
    client, asked, plan = holder.clients["anna"], request(holder), resolve(holder.plan.config).privacy
    assert plan is not None
    job = train.make_job(client, asked, 0, 2)
    seeds = {private_job(job, client, plan, bytes([number]) * 32).seed for number in range(5)}
    assert len(seeds) == 5
    assert job.seed not in seeds


def test_rows_are_drawn_by_coins_at_the_rate_that_is_counted(open_one: Callable) -> None:
    holder = open_one(60, **EXAMPLE)
    client, plan = holder.clients["anna"], resolve(holder.plan.config).privacy
    assert plan is not None
    asked = request(holder)
    job = replace(train.make_job(client, asked, 0, 2), batches=((),) * 3000)
    private = private_job(job, client, plan, request_key(plan, asked, client, bytes(32)))
    sizes = torch.tensor([float(len(batch)) for batch in private.batches])
    rate = plan.sampling_rate(len(client.train))
    number = len(client.train)
    assert rate == 2 / number
    assert float(sizes.mean()) == pytest.approx(2.0, abs=3.3 * (2 * (1 - rate) / 3000) ** 0.5)
    assert float(sizes.var()) == pytest.approx(number * rate * (1 - rate), rel=0.12)
    assert 0 in sizes
    assert private.example_clip < plan.clip
    assert private.noise is not None
    assert private.noise.deviation == pytest.approx(plan.multiplier() * plan.clip / 2)
    assert private.training.clip_norm == 0.0
    assert plan.charge(number).rate >= rate


@pytest.mark.parametrize("flat", [EXAMPLE, LOCAL, {**CLIENT, "privacy.clip": 0.05}])
def test_what_leaves_is_clipped_and_says_nothing_else(flat: dict[str, Any], open_one: Callable) -> None:
    holder = open_one(**flat)
    asked = request(holder, clip=0.05 if flat.get("privacy.clip") == 0.05 else 0.0)
    for answer in train_clients(holder, asked):
        assert isinstance(answer, ClientUpdate)
        assert (answer.train_loss, answer.num_tokens, answer.num_truncated, answer.seconds) == (0, 0, 0, 0)
        if asked.clip:
            assert float(answer.delta.double().norm()) <= 0.05
    loud = open_one(**{**flat, "privacy.metrics": "all", "run.name": "loud"})
    answer = train_clients(loud, replace(asked, clip=asked.clip))[0]
    assert isinstance(answer, ClientUpdate)
    assert answer.train_loss > 0


def test_a_central_plan_needs_a_server_that_names_its_clip(open_one: Callable) -> None:
    holder = open_one(**CLIENT)
    with pytest.raises(ConfigError, match="needs a fedllm server, which adds the noise"):
        train_clients(holder, request(holder))
    content = RecordDict({"arrays": write_plain(initial_adapter(holder.engine.layout, 0, "orthonormal"))})
    with pytest.raises(ConfigError, match="needs a fedllm server"):
        train_for_stock(holder, content, 1)


def test_a_stock_strategy_gets_updates_that_are_private_already(open_one: Callable) -> None:
    holder = open_one(**EXAMPLE)
    start = initial_adapter(holder.engine.layout, 0, "orthonormal")
    reply = train_for_stock(holder, RecordDict({"arrays": write_plain(start)}), 1)
    assert reply.metric_records["metrics"]["train-loss"] == 0.0
    assert (holder.store.folder / "ben" / "privacy-ledger.json").exists()


def test_held_out_losses_stay_where_they_are_withheld(open_one: Callable) -> None:
    holder = open_one(**CLIENT)
    layout = holder.engine.layout
    adapter = initial_adapter(layout, 0)
    asked = EvaluateRequest(
        round_num=1, client_ids=("anna",), adapter=adapter, base_delta=no_base_delta(layout), local_b=False
    )
    with pytest.raises(WithheldError, match="stay with the clients"):
        evaluate_clients(holder, asked)


def test_the_key_of_an_answer_depends_on_all_it_answers(open_one: Callable) -> None:
    holder, more = open_one(12, **EXAMPLE), open_one(13, **EXAMPLE)
    asked, client = request(holder), holder.clients["anna"]
    plan, zeros, other = (
        resolve(holder.plan.config).privacy,
        bytes(32),
        initial_adapter(holder.engine.layout, 1),
    )
    assert plan is not None
    keys = {
        request_key(plan, asked, client, zeros),
        request_key(plan, asked, client, bytes(31) + b"1"),
        request_key(plan, asked, holder.clients["ben"], zeros),
        request_key(plan, asked, more.clients["anna"], zeros),
        request_key(plan, replace(asked, round_num=2), client, zeros),
        request_key(plan, replace(asked, seed=1), client, zeros),
        request_key(plan, replace(asked, trained="both"), client, zeros),
        request_key(plan, replace(asked, adapter=other), client, zeros),
        request_key(plan, replace(asked, training=replace(asked.training, steps=3)), client, zeros),
        request_key(plan, replace(asked, num_drawn=(4, 0)), client, zeros),
        request_key(replace(plan, clip=0.5), asked, client, zeros),
        request_key(replace(plan, noise_multiplier=2.0), asked, client, zeros),
        request_key(replace(plan, batch_size=3), asked, client, zeros),
    }
    assert len(keys) == 13


def test_a_machine_that_demands_noise_lets_no_exact_numbers_leave(
    open_one: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("max-epsilon = 4.0")
    monkeypatch.setenv("FEDLLM_POLICY", str(policy))
    budget = {"privacy.epsilon": 2.0}
    with pytest.raises(ConfigError, match=r"privacy\.metrics = 'all' exact numbers .*; use withheld"):
        open_one(15, **budget, **{"privacy.metrics": "all"})
    local = {**budget, "privacy.unit": "client", "privacy.trust": "local"}
    assert open_one(15, **local).clients
    with pytest.raises(ConfigError, match=r"privacy\.metrics = 'held-out' exact numbers"):
        open_one(15, **local, **{"privacy.metrics": "held-out"})
    assert open_one(15, **budget, **{"privacy.metrics": "held-out"}).clients
    policy.write_text("max-epsilon = 0.0")
    assert open_one(15, **budget, **{"privacy.metrics": "all"}).clients


@pytest.mark.parametrize(
    ("flat", "is_allowed"),
    [
        ({}, False),
        (CLIENT, False),
        (EXAMPLE, False),
        ({"privacy.epsilon": 2.0}, True),
        ({"privacy.epsilon": 2.0, "privacy.delta": 0.1}, False),
    ],
)
def test_a_machine_may_demand_noise_of_its_own(
    flat: dict[str, Any],
    is_allowed: bool,
    open_one: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("max-epsilon = 4.0")
    monkeypatch.setenv("FEDLLM_POLICY", str(policy))
    if is_allowed:
        assert open_one(14, **flat).clients
    else:
        with pytest.raises(ConfigError, match=r"up to privacy.epsilon = 4 at delta 1e-05; the run has"):
            open_one(14, **flat)
