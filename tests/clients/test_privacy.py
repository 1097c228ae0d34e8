"""A client under a privacy plan: its own ledger, its secret, its coins, what it refuses."""

import json
import logging
import math
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from clients.data_holder import DataHolder
from clients.evaluate import evaluate_clients
from clients.jobs import make_job
from clients.privacy import private_job, request_key
from clients.process import Process
from clients.protect import protect_clients
from clients.stock import train_for_stock
from clients.technique import NodeRound, Technique, Works
from clients.techniques import plan_node_round
from clients.train import prepare_clients, train_clients
from fedllm.adapters.layout import initial_adapter
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job, Result
from fedllm.errors import ConfigError, ModelError, WithheldError
from fedllm.messages import ClientFailure, ClientUpdate, TrainRequest
from fedllm.plan.privacy import PrivacyPlan
from fedllm.privacy.accounting import Charge, epsilon_of
from fedllm.wire.stock import write_plain
from tests.builders import evaluate_request, train_request

EXAMPLE = {"privacy.epsilon": 1e4, "privacy.noise-multiplier": 1.0}
CLIENT = {"privacy.epsilon": 1e4, "privacy.noise-multiplier": 1.0, "privacy.unit": "client"}
LOCAL = {**CLIENT, "privacy.trust": "local", "privacy.clip": 0.1}


@pytest.fixture
def open_one(write_rows: Callable, make_config: Callable, tmp_path: Path) -> Callable[..., DataHolder]:
    """Return a function (rows of anna, **flat) -> a holder of two clients with a state folder of its own."""

    def start(number: int = 12, **flat: Any) -> DataHolder:
        file = write_rows(f"rows{number}.jsonl", {"anna": number, "ben": 6})
        config = make_config(file, **{"run.name": f"r{number}", **flat})
        node = {"server-paths": True, "state-path": str(tmp_path / "state")}
        return Process().open(config.to_flat(), node)

    return start


def request(holder: DataHolder, **changes: Any) -> TrainRequest:
    return train_request(holder, "anna", "ben", **changes)


def privacy_of(holder: DataHolder) -> PrivacyPlan:
    assert holder.plan.privacy is not None
    return holder.plan.privacy


def plain_job(holder: DataHolder, name: str) -> Job:
    asked = request(holder)
    this_round = plan_node_round(holder, asked)
    return make_job(this_round, holder.clients[name], 0, rank=2, start_P=asked.adapter.vector)


def entries(holder: DataHolder, name: str = "anna") -> list[Any]:
    """Return what a client's ledger holds."""
    file = holder.store.folder / name / "privacy-ledger.json"
    found: list[Any] = json.loads(file.read_text()) if file.exists() else []
    return found


def deltas(answers: Any) -> dict[str, torch.Tensor]:
    assert all(isinstance(answer, ClientUpdate) for answer in answers)
    return {answer.client_id: answer.delta for answer in answers}


@pytest.mark.parametrize("flat", [EXAMPLE, LOCAL])
def test_repeated_request_gets_same_answer_for_one_charge(flat: dict[str, Any], open_one: Callable) -> None:
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


def test_client_refuses_once_its_own_budget_is_spent(
    open_one: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    one = epsilon_of([Charge(0.5, 1.0, 1)], 1e-5)  # local: opposite updates are two clips apart
    holder = open_one(**{**LOCAL, "privacy.epsilon": one * 1.01})
    deltas(train_clients(holder, request(holder)))
    with caplog.at_level(logging.ERROR):
        answers = train_clients(holder, request(holder, round_num=2))
    assert answers == [
        ClientFailure(client_id="anna", code="budget-spent"),
        ClientFailure(client_id="ben", code="budget-spent"),
    ]
    assert all("privacy.epsilon" in line for line in caplog.messages)
    assert len(caplog.messages) == 2  # why is said on the client's own machine
    deltas(train_clients(holder, request(holder)))  # what was paid for may be asked for again


def test_another_precision_of_the_model_is_charged_anew(open_one: Callable) -> None:
    """Its gradients differ a little: under the same noise the difference of both answers would be bare."""
    answers = []
    for dtype in ("float32", "bfloat16"):
        holder = open_one(**{**EXAMPLE, "privacy.noise-multiplier": 100.0, "model.dtype": dtype})
        answers.append(deltas(train_clients(holder, request(holder)))["anna"])
    assert float((answers[0] - answers[1]).norm()) > 0.5 * float(answers[0].norm())
    assert len(json.loads((holder.store.folder / "anna" / "privacy-ledger.json").read_text())) == 2


@pytest.mark.parametrize("change", [{"train.token-budget": 1}, {"model.num-threads": 2}])
def test_a_run_with_other_keys_pays_where_its_bits_differ(change: dict[str, Any], open_one: Callable) -> None:
    """Any key may change how an answer is rounded; another delta has other noise, which averages out."""
    answers = []
    for flat in (LOCAL, {**LOCAL, **change}):
        holder = open_one(**flat)
        answers.append(deltas(train_clients(holder, request(holder)))["anna"])
    assert len(entries(holder)) == 2 - torch.equal(*answers)


@contextmanager
def other_weights(holder: DataHolder, share: float) -> Iterator[None]:
    """Let the model of a holder compute a little otherwise, as another device does, and no file say so."""
    embedding = holder.engine.base.model.get_input_embeddings().weight
    kept = embedding.detach().clone()
    try:
        embedding.mul_(1 + share)
        yield
    finally:
        embedding.copy_(kept)


def test_every_other_answer_to_one_request_is_charged(open_one: Callable) -> None:
    """What is counted is what leaves: the request is the same each time, the noise is not."""
    budget = epsilon_of([Charge(0.5, 1.0, 3)], 1e-5)  # local: opposite updates are two clips apart
    holder = open_one(**{**LOCAL, "privacy.epsilon": budget * 1.01})
    given = []
    for number in range(5):
        with other_weights(holder, number / 100):
            given.append(train_clients(holder, request(holder))[0])
    assert [isinstance(answer, ClientUpdate) for answer in given] == [True] * 3 + [False] * 2
    assert given[3] == ClientFailure(client_id="anna", code="budget-spent")
    assert len({entry["release"] for entry in entries(holder)}) == len(entries(holder)) == 3
    again = deltas(train_clients(holder, request(holder)))  # bits that have left may leave again
    assert torch.equal(again["anna"], given[0].delta)
    assert len(entries(holder)) == 3


def test_rows_that_one_draw_gave_twice_are_sampled_once(open_one: Callable) -> None:
    """The coins follow the request: of two answers to it, the second is one of rows that were known."""
    holder = open_one(**EXAMPLE)
    with other_weights(holder, 0.01):
        deltas(train_clients(holder, request(holder)))
    deltas(train_clients(holder, request(holder)))
    deltas(train_clients(holder, request(holder, round_num=2)))
    rates = [entry["charges"]["anna"]["rate"] for entry in entries(holder)]
    assert rates == [rates[0], 1.0, rates[0]]
    assert rates[0] < 0.3


def out_of_memory(*arguments: Any) -> Any:
    raise MemoryError


def diverge(engine: Engine, jobs: Any) -> list[Result]:
    """Return results that no plan lets leave as they are."""
    return [Result(job.client_id, job.start * math.nan, math.nan, 2, 9, 0.1) for job in jobs]


@pytest.mark.parametrize("flat", [LOCAL, EXAMPLE])
def test_what_fails_before_it_leaves_costs_nothing(
    flat: dict[str, Any], open_one: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = open_one(**flat)
    for place in ("fedllm.engine.engine.Engine.train", "clients.protect.protect"):
        monkeypatch.setattr(place, out_of_memory)
        with pytest.raises(MemoryError):
            train_clients(holder, request(holder))
        monkeypatch.undo()
    nowhere = open_one(**{**flat, "model.device": "cuda:99"})
    with pytest.raises(ModelError, match=r"model\.device = 'cuda:99'"):
        train_clients(nowhere, request(holder))
    assert entries(holder) == []
    deltas(train_clients(holder, request(holder)))
    assert len(entries(holder)) == 1


@pytest.mark.parametrize("flat", [LOCAL, EXAMPLE])
def test_private_training_that_diverges_says_so_at_home_alone(
    flat: dict[str, Any],
    open_one: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether noised training diverged tells of it: as a failure it would be an uncounted answer."""
    holder = open_one(**flat)
    monkeypatch.setattr(Engine, "train", diverge)
    answers = deltas(train_clients(holder, request(holder)))
    assert all(bool(torch.isfinite(delta).all()) for delta in answers.values())
    assert [bool(delta.any()) for delta in answers.values()] == [flat is LOCAL] * 2
    assert "client anna: training diverged" in caplog.text
    assert len(entries(holder)) == 1


@pytest.mark.parametrize("flat", [LOCAL, EXAMPLE])
def test_equal_updates_of_two_requests_are_two_releases(
    flat: dict[str, Any], open_one: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may choose an adapter with which a row it guessed gives no gradient: equal would tell."""
    holder = open_one(**flat)
    monkeypatch.setattr(Engine, "train", diverge)
    other = initial_adapter(holder.engine.layout, 1)
    asked = (request(holder), request(holder, adapter=other), request(holder))
    first, second, again = (deltas(train_clients(holder, one))["anna"] for one in asked)
    assert torch.equal(first, again)
    assert len(entries(holder)) == 2
    if flat is LOCAL:  # where the client's whole update is noised; of DP-SGD zeros are the result
        assert float((first - second).norm()) > 0.5 * float(first.norm())


def test_a_damaged_ledger_is_no_empty_ledger(open_one: Callable, caplog: pytest.LogCaptureFixture) -> None:
    holder = open_one(**EXAMPLE)
    deltas(train_clients(holder, request(holder)))
    (holder.store.folder / "anna" / "privacy-ledger.json").write_text("{")
    with caplog.at_level(logging.ERROR):
        answers = train_clients(holder, request(holder, round_num=2))
    assert "privacy-ledger.json is damaged" in caplog.text
    assert answers[0] == ClientFailure(client_id="anna", code="checkpoint")
    assert isinstance(answers[1], ClientUpdate)


@pytest.mark.parametrize("flat", [pytest.param(LOCAL, marks=pytest.mark.soak), EXAMPLE])
def test_other_noise_in_a_run_of_same_name_is_unrelated(flat: dict[str, Any], open_one: Callable) -> None:
    """The same noise in two amounts could be subtracted: 2 r1 - r2 would be the update itself."""
    answers = []
    for noise in (1.0, 2.0):
        holder = open_one(**{**flat, "privacy.noise-multiplier": noise})
        answers.append(deltas(train_clients(holder, request(holder)))["anna"])
    difference = 2 * answers[0] - answers[1]
    assert float(difference.norm()) > 0.5 * float(answers[1].norm())
    assert len(json.loads((holder.store.folder / "anna" / "privacy-ledger.json").read_text())) == 2


@pytest.mark.parametrize("flat", [LOCAL, EXAMPLE])
def test_what_the_plan_does_not_name_never_leaves(flat: dict[str, Any], open_one: Callable) -> None:
    """A request cannot say how clients train; control variates, which it can carry, are left alone."""
    holder = open_one(**flat)
    asked = request(holder)
    plain = deltas(train_clients(holder, asked))
    answers = train_clients(holder, replace(asked, control=asked.adapter))
    assert all(torch.equal(delta, plain[name]) for name, delta in deltas(answers).items())
    assert all(isinstance(a, ClientUpdate) and a.control_delta is None for a in answers)


def test_no_technique_changes_what_is_protected(open_one: Callable) -> None:
    def louder(this_round: NodeRound, works: Works) -> Works:
        return [replace(work, update=replace(work.sent, delta=9 * work.sent.delta)) for work in works]

    technique = Technique(name="louder", after=louder)
    for flat, is_refused in (({}, False), (LOCAL, True)):
        holder = open_one(**flat)
        this_round = replace(plan_node_round(holder, request(holder)), techniques=(technique,))
        works = prepare_clients(this_round, {"anna": 0})
        results = holder.engine.train([work.job for work in works])
        works = [replace(work, result=result) for work, result in zip(works, results, strict=True)]
        if is_refused:
            with pytest.raises(RuntimeError, match="louder"):
                protect_clients(this_round, works)
        else:
            (work,), _ = protect_clients(this_round, works)
            assert torch.equal(work.sent.delta, 9 * work.trained.delta.float())


def test_masks_of_dropout_come_from_the_secret_under_dp_sgd(open_one: Callable) -> None:
    holder = open_one(**EXAMPLE)
    client, plan = holder.clients["anna"], privacy_of(holder)
    job = plain_job(holder, "anna")
    seeds = {private_job(job, client, plan, bytes([number]) * 32).seed for number in range(5)}
    assert len(seeds) == 5
    assert job.seed not in seeds


def test_rows_are_drawn_by_coins_at_the_rate_that_is_counted(open_one: Callable) -> None:
    holder = open_one(60, **EXAMPLE)
    client, plan = holder.clients["anna"], privacy_of(holder)
    job = replace(plain_job(holder, "anna"), batches=((),) * 3000)
    this_round = plan_node_round(holder, request(holder))
    private = private_job(job, client, plan, request_key(this_round, plan, client, bytes(32)))
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


@pytest.mark.parametrize(
    "flat", [EXAMPLE, pytest.param(LOCAL, marks=pytest.mark.soak), {**CLIENT, "privacy.clip": 0.05}]
)
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
        train_for_stock(holder, content)


def test_a_stock_strategy_gets_updates_that_are_private_already(open_one: Callable) -> None:
    holder = open_one(**EXAMPLE)
    start = initial_adapter(holder.engine.layout, 0, "orthonormal")
    reply = train_for_stock(holder, RecordDict({"arrays": write_plain(start)}))
    assert reply.metric_records["metrics"]["train-loss"] == 0.0
    assert (holder.store.folder / "ben" / "privacy-ledger.json").exists()


def test_held_out_losses_stay_where_they_are_withheld(open_one: Callable) -> None:
    holder = open_one(**CLIENT)
    with pytest.raises(WithheldError, match="stay with the clients"):
        evaluate_clients(holder, evaluate_request(holder, "anna"))


def test_the_key_of_an_answer_depends_on_all_it_answers(open_one: Callable) -> None:
    holder, more = open_one(12, **EXAMPLE), open_one(13, **EXAMPLE)
    asked, client, plan = request(holder), holder.clients["anna"], privacy_of(holder)
    zeros, other = bytes(32), initial_adapter(holder.engine.layout, 1)
    this_round = plan_node_round(holder, asked)
    other_seed = open_one(12, **EXAMPLE, seed=1)
    more_steps = replace(this_round.training, steps=3)

    def key(**changes: Any) -> bytes:
        return request_key(plan_node_round(holder, replace(asked, **changes)), plan, client, zeros)

    keys = {
        key(),
        key(round_num=2),
        key(adapter=other),
        key(drawn={"anna": 4, "ben": 0}),
        request_key(this_round, plan, client, bytes(31) + b"1"),
        request_key(this_round, plan, holder.clients["ben"], zeros),
        request_key(this_round, plan, more.clients["anna"], zeros),
        request_key(replace(this_round, holder=other_seed), plan, client, zeros),
        request_key(replace(this_round, trained="both"), plan, client, zeros),
        request_key(replace(this_round, training=more_steps), plan, client, zeros),
        request_key(this_round, replace(plan, clip=0.5), client, zeros),
        request_key(this_round, replace(plan, noise_multiplier=2.0), client, zeros),
        request_key(this_round, replace(plan, batch_size=3), client, zeros),
    }
    assert len(keys) == 13


def test_the_key_of_an_answer_depends_on_every_weight(
    make_model_folder: Callable[..., Path], open_one: Callable, tmp_path: Path
) -> None:
    """The fingerprint samples the ends of a tensor; a change in its middle gives other gradients too."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        shutil.copytree(make_model_folder(), folder)
    with (folders[1] / "model.safetensors").open("r+b") as weights:
        weights.seek(8 + int.from_bytes(weights.read(8), "little") + 20_000)  # within the embedding
        weights.write(bytes(4))
    holder = open_one(**EXAMPLE)
    own = [replace(holder, plan=holder.plan.with_own_model(str(folder))) for folder in folders]
    assert own[0].engine.base.fingerprint == own[1].engine.base.fingerprint
    keys = {
        request_key(plan_node_round(one, request(one)), privacy_of(one), one.clients["anna"], bytes(32))
        for one in own
    }
    assert len(keys) == 2
