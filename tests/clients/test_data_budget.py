"""A node under [budget]: what it admits, and what all runs together may take of its rows."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clients import site
from clients.data_holder import DataHolder
from clients.process import Process
from clients.site import data_budget
from clients.train import train_clients
from fedllm.errors import PolicyError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.plan.privacy import PrivacyPlan
from fedllm.privacy.accounting import Charge, epsilon_of
from fedllm.privacy.data_budget import DataBudget, spent
from fedllm.site_policy import Allowed, Budget, SitePolicy
from tests.builders import train_request

WITHHELD = {"privacy.metrics": "withheld"}
EXAMPLE = {"privacy.epsilon": 2.0, **WITHHELD}
CLIENT = {"privacy.epsilon": 2.0, "privacy.unit": "client", "privacy.trust": "local", "privacy.clip": 0.1}


@pytest.fixture
def open_site(
    write_rows: Callable, make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., DataHolder]:
    """Return a function ([budget] as text, **flat) -> a node of a site with 12 rows of its own."""
    file = write_rows("own.jsonl", {"anna": 12})

    def start(text: str = "", node: dict[str, Any] | None = None, **flat: Any) -> DataHolder:
        site = tmp_path / "site.toml"
        site.write_text(f'[site]\nstate-path = "state"\n[budget]\n{text}\n')
        monkeypatch.setenv("FEDLLM_SITE", str(site))
        own = {"data-path": str(file), "client-id": "anna", "server-paths": True}
        return Process().open(make_config(**flat).to_flat(), own if node is None else node)

    return start


def budget_of(holder: DataHolder) -> DataBudget:
    budget = data_budget(holder.data_path, holder.state_path)
    assert budget is not None
    return budget


def answer(holder: DataHolder, round_num: int = 1) -> ClientUpdate | ClientFailure:
    (given,) = train_clients(holder, train_request(holder, "anna", round_num=round_num))
    return given


@pytest.mark.parametrize(
    ("unit", "flat", "why"),
    [
        ("example", {}, r"within epsilon 4 at delta 1e-05; the run has none"),
        ("example", {**CLIENT, "privacy.trust": "central"}, "the run has 2 at delta .* with trust central"),
        ("example", {**EXAMPLE, "privacy.epsilon": 5.0}, "the run has 5"),
        ("example", {**EXAMPLE, "privacy.delta": 0.1}, "the run has 2 at delta 0.1"),
        ("example", {"privacy.epsilon": 2.0}, r"privacy\.metrics = 'held-out'; the run must set"),
        ("example", {"privacy.epsilon": 2.0, "privacy.metrics": "all"}, r"privacy\.metrics = 'all'"),
        ("client", EXAMPLE, r"for unit 'client', within epsilon 4; the run's privacy\.unit is 'example'"),
    ],
)
def test_a_run_that_no_noise_of_the_site_protects_is_refused(
    unit: str, flat: dict[str, Any], why: str, open_site: Callable
) -> None:
    with pytest.raises(PolicyError, match=why):
        open_site(f'epsilon = 4\nunit = "{unit}"', **flat)
    assert open_site("", **flat).clients  # without a limit it takes part


def test_runs_that_hide_enough_are_admitted(open_site: Callable) -> None:
    assert open_site("epsilon = 4", **EXAMPLE).clients
    for unit in ("example", "client"):
        assert open_site(f'epsilon = 4\nunit = "{unit}"', **CLIENT).clients


def test_shares_of_noise_count_where_the_site_chooses_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share protects with those of others only, so a site that takes part with anyone refuses it."""
    plan = PrivacyPlan(epsilon=2.0, delta=1e-6, unit="client", trust="distributed")
    policy = SitePolicy(budget=Budget(epsilon=4.0), allow=Allowed(secure_aggregation="required"))
    monkeypatch.setattr(site, "load_policy", lambda: policy)
    site.check_privacy(plan, {"data-path": "rows.jsonl"})
    monkeypatch.setattr(site, "load_policy", lambda: replace(policy, allow=Allowed()))
    with pytest.raises(PolicyError, match="the run has 2 at delta 1e-06 with trust distributed"):
        site.check_privacy(plan, {"data-path": "rows.jsonl"})


def test_a_budget_wants_rows_that_are_the_nodes_own(open_site: Callable) -> None:
    with pytest.raises(PolicyError, match=r"rows dealt from data\.source; name its own"):
        open_site("epsilon = 4", node={"server-paths": True}, **EXAMPLE)


@pytest.mark.parametrize("flat", [EXAMPLE, CLIENT])
def test_runs_of_other_names_spend_one_budget(flat: dict[str, Any], open_site: Callable) -> None:
    """Each run has a budget of 2 for 4 rounds, and the data have one of 2.2 for all of them."""
    given = []
    for number in range(4):
        rounds = {"federation.num-rounds": 4, "run.name": f"run{number}", "lora.rank": 1 + number % 2}
        holder = open_site("epsilon = 2.2", **flat, **rounds)
        given += [answer(holder, round_num) for round_num in (1, 2, 3)]
    answered = [isinstance(one, ClientUpdate) for one in given]
    assert answered[:4] == [True] * 4
    assert not any(answered[6:])
    assert {one.code for one in given if isinstance(one, ClientFailure)} == {"budget-spent"}
    budget = budget_of(holder)
    assert 1.5 < spent(budget.ledger, "example", 1e-5) <= 2.2 * (1 + 1e-6)
    assert len(budget.ledger.entries) == sum(answered)
    assert {entry.run.split("-")[0] for entry in budget.ledger.entries} <= {"run0", "run1", "run2"}
    assert budget.folder.is_relative_to(holder.state_path)


def test_an_answer_that_left_may_leave_again_for_nothing(open_site: Callable) -> None:
    holder = open_site("epsilon = 2", **EXAMPLE)
    first, again = answer(holder), answer(open_site("epsilon = 2", **EXAMPLE))
    assert isinstance(first, ClientUpdate)
    assert isinstance(again, ClientUpdate)
    assert first.delta.equal(again.delta)
    assert len(budget_of(holder).ledger.entries) == 1


def test_the_ledger_counts_before_a_limit_is_set(open_site: Callable) -> None:
    one = epsilon_of([Charge(0.5, 1.0, 1)], 1e-5)  # two updates may be two clips apart
    loud = {**CLIENT, "privacy.epsilon": 1.5 * one, "privacy.noise-multiplier": 1.0}
    assert isinstance(answer(open_site("", **loud)), ClientUpdate)
    later = open_site(f"epsilon = {1.5 * one}", **loud, **{"run.name": "later"})
    assert answer(later) == ClientFailure(client_id="anna", code="budget-spent")


def other_weights(model: Path, folder: Path) -> str:
    """Return a copy of a model that differs within its embedding, where a fingerprint does not read."""
    shutil.copytree(model, folder)
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(8 + int.from_bytes(weights.read(8), "little") + 20_000)
        weights.write(bytes(400))
    return str(folder)


@pytest.mark.parametrize("flat", [EXAMPLE, pytest.param(CLIENT, marks=pytest.mark.soak)])
def test_every_other_computation_of_an_answer_is_charged(
    flat: dict[str, Any], open_site: Callable, make_model_folder: Callable, tmp_path: Path
) -> None:
    """A run resumed under another precision, with other threads or other weights gives other bits."""
    altered = other_weights(make_model_folder(), tmp_path / "altered")
    given, flat = [], {**flat, "privacy.epsilon": 500.0, "privacy.noise-multiplier": 1.0}
    for changes in ({}, {"model.dtype": "bfloat16"}, {"model.num-threads": 2}, {"model.name": altered}, {}):
        given.append(answer(open_site("epsilon = 500", **{**flat, **changes})))
    assert all(isinstance(one, ClientUpdate) for one in given)
    bits = {one.delta.numpy().tobytes() for one in given if isinstance(one, ClientUpdate)}
    assert 3 <= len(bits) <= 4  # two threads may give the same
    budget = budget_of(open_site("epsilon = 500", **flat))
    assert len(budget.ledger.entries) == len(bits)
    assert sum(charge.count for charge in budget.ledger.charges_of("example")) >= len(bits)
