"""`fedllm site budget`: what is spent and left, by data set, unit and run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.privacy.accounting import Charge, epsilon_of
from fedllm.privacy.data_budget import DataBudget, budget_folder
from fedllm.privacy.ledger import Entry
from scripts.commands.site_budget_command import budget

DATA = Path("/private/rows.jsonl")


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """Return a function ([budget] as text, **units of the charges of each run) -> a site's file."""

    def make(text: str = "", **units: tuple[str, ...]) -> Path:
        file = tmp_path / "site.toml"
        file.write_text(f'[site]\nstate-path = "state"\n[budget]\n{text}\n')
        kept = DataBudget(folder=budget_folder(tmp_path / "state", DATA))
        for run, charged in units.items():
            for number, unit in enumerate(charged):
                entry = Entry(number, 0, "bits", {"anna": Charge(2.0, 1.0, 1)}, run=run)
                kept.pay(entry, unit, DATA)
        return file

    return make


def spent(number: int) -> float:
    return epsilon_of([Charge(2.0, 1.0, number)], 1e-5)


def test_spent_and_left_are_told_by_unit_and_run(site: Callable, capsys: pytest.CaptureFixture) -> None:
    file = site("epsilon = 8", one=("client", "client"), two=("example",))
    budget(file, as_json=True)
    example, client = json.loads(capsys.readouterr().out)
    assert example["data_set"] == client["data_set"] == str(DATA)
    assert example["spent"] == spent(3)
    assert example["left"] == 8 - spent(3)
    assert example["runs"] == {"one": spent(2), "two": spent(1)}
    assert (client["unit"], client["spent"], client["left"]) == ("client", None, None)
    assert client["runs"] == {"one": spent(2), "two": None}
    budget(file, as_json=False)
    told = capsys.readouterr().out
    assert f"{8 - spent(3):.3g} of 8" in told
    assert "no bound" in told


def test_a_site_without_limit_or_ledger_says_so(site: Callable, capsys: pytest.CaptureFixture) -> None:
    file = site()
    budget(file, as_json=False)
    assert "no answer under a privacy plan has left" in capsys.readouterr().out
    budget(site(one=("example",)), as_json=False)
    assert "no limit" in capsys.readouterr().out


def test_where_a_unit_has_no_bound_nothing_is_left(site: Callable, capsys: pytest.CaptureFixture) -> None:
    budget(site('epsilon = 8\nunit = "client"', one=("example",)), as_json=True)
    (_, client) = json.loads(capsys.readouterr().out)
    assert (client["spent"], client["left"], client["limit"]) == (None, 0.0, 8)
