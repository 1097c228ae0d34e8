"""A site splits its own rows: no run moves one across, and under [budget] none shows in a number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.data_holder import DataHolder
from clients.join import declare_clients
from clients.own_rows import held_out_places
from clients.process import Process
from clients.train import train_clients
from fedllm.errors import CheckpointError, DataError
from fedllm.messages import ClientUpdate
from tests.builders import train_request

NUM_ROWS = 40
EXAMPLE = {"privacy.epsilon": 2.0, "privacy.metrics": "withheld"}
CLIENT = {**EXAMPLE, "privacy.unit": "client", "privacy.trust": "local"}


def row(number: int) -> dict[str, Any]:
    return {"instruction": f"question {number}", "output": f"answer {number}", "note": f"note {number}"}


@pytest.fixture
def open_site(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., DataHolder]:
    """Return a function (rows, site.toml, node config, **flat) -> a node of a site with those rows."""

    def start(
        rows: list[Any] | None = None, site: str = "", node: dict[str, Any] | None = None, **flat: Any
    ) -> DataHolder:
        lines = [row(number) for number in range(NUM_ROWS)] if rows is None else rows
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "site.toml").write_text('site.state-path = "state"\n' + site)
        monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))
        own = {"data-path": str(tmp_path / "own.jsonl"), "client-id": "anna", "server-paths": True}
        return Process().open(make_config(**flat).to_flat(), {**own, **(node or {})})

    return start


def held_out(holder: DataHolder) -> list[tuple[int, ...]]:
    return [one.tokens for one in holder.clients["anna"].held_out]


@pytest.mark.parametrize(
    "flat",
    [
        {"seed": 5},
        {"data.max-held-out": 1},
        {"data.held-out-fraction": 0.9},
        {"data.max-rows": 3},
        {"run.name": "other"},
    ],
)
def test_no_run_moves_what_is_held_out(flat: dict[str, Any], open_site: Callable) -> None:
    first = held_out(open_site())
    assert len(first) == NUM_ROWS // 10
    holder = open_site(**flat)
    assert held_out(holder) == first
    assert not {one.tokens for one in holder.clients["anna"].train} & set(first)


def test_other_columns_read_the_same_rows_on_the_same_side(open_site: Callable) -> None:
    lines = [row(number) for number in range(NUM_ROWS)]
    for line in lines[::8]:
        line["output"] = None  # of no use under one mapping, and of use under the other
    sides = []
    for columns in ("prompt=instruction,response=output", "prompt=instruction,response=note"):
        holder = open_site(lines, **{"data.columns": columns, "train.max-length": 128})
        sides.append([len(holder.clients["anna"].train), {tokens[:12] for tokens in held_out(holder)}])
    assert sides[0][0] < sides[1][0]
    assert sides[0][1] <= sides[1][1]


def test_another_site_holds_out_other_rows(tmp_path: Path) -> None:
    places = [("own.jsonl", line) for line in range(1000)]
    one, other = (held_out_places(tmp_path / name, tmp_path, 0, places) for name in ("a", "b"))
    assert len(one) == len(other) == 100
    assert one != other
    assert held_out_places(tmp_path / "a", tmp_path, 0, places) == one


def test_the_owner_says_how_many_and_later_rows_follow(tmp_path: Path) -> None:
    def chosen(number: int, wanted: int = 20) -> set[tuple[str, int]]:
        return held_out_places(tmp_path, tmp_path, wanted, [("own.jsonl", line) for line in range(number)])

    first = chosen(200)
    assert len(first) == 20
    more = chosen(2000)
    assert {place for place in more if place[1] < 200} == first
    # About a tenth: its share follows Beta(20, 181), the 20th smallest of 200 draws, so is outside this once
    # in 10,000 secrets.
    assert 60 < len(more) < 420
    assert len(chosen(200, wanted=30)) == 30
    assert len(chosen(1, wanted=5)) == 0  # one row at least is trained on


def test_a_note_or_secret_that_is_damaged_is_said(tmp_path: Path) -> None:
    places = [("own.jsonl", line) for line in range(20)]
    held_out_places(tmp_path, tmp_path, 0, places)
    (note,) = tmp_path.rglob("held-out.json")
    note.write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged; restore it"):
        held_out_places(tmp_path, tmp_path, 0, places)


def test_a_copy_of_a_training_row_is_not_measured(open_site: Callable) -> None:
    lines = [row(number) for number in range(20)] * 2
    client = open_site(lines, node={"held-out-rows": 10}).clients["anna"]
    learnt = {one.tokens for one in client.train}
    assert len(client.train) == 30
    assert not learnt & {one.tokens for one in client.held_out}


BUDGET = "budget.epsilon = 4\n"


@pytest.mark.parametrize(
    ("plan", "flat"),
    [
        (EXAMPLE, {"train.max-length": 14}),  # most answers are cut
        (CLIENT, {"train.max-length": 8}),  # all are
        pytest.param(EXAMPLE, {"data.columns": "prompt=instruction,response=rare"}, marks=pytest.mark.soak),
        (CLIENT, {"data.columns": "prompt=instruction,response=absent"}),
        (EXAMPLE, {"data.on-bad-row": "stop"}),
    ],
)
def test_under_a_budget_no_row_shows_in_sizes_or_failures(
    plan: dict[str, Any], flat: dict[str, Any], open_site: Callable
) -> None:
    """A server that chose lengths and columns would count rows by what they say."""
    lines: list[Any] = [row(number) for number in range(NUM_ROWS)]
    lines[7] = {**lines[7], "rare": "once"}
    lines[9] = "no row at all"
    told = []
    for rows, more in ((lines, flat), ([{}] * NUM_ROWS, {})):
        holder = open_site(rows, BUDGET, **plan, **more)
        (declared,) = declare_clients(holder, 1)
        told.append((declared.num_train, declared.num_held_out, declared.cause))
        (answer,) = train_clients(holder, train_request(holder, "anna"))
        assert isinstance(answer, ClientUpdate)
        assert answer.delta.isfinite().all()
        told[-1] += (answer.weight, answer.num_tokens, answer.train_loss, answer.num_truncated)
    weight = 36.0 if plan is EXAMPLE else 1.0  # clients count alike where all of one is hidden
    assert told == [(36, 0, "", weight, 0, 0.0, 0)] * 2


def test_under_a_budget_a_row_that_breaks_the_tokenizer_fails_alone(
    open_site: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clients.tokens

    class Panic(BaseException):
        pass

    encode = clients.tokens.encode_or_cause

    def breaks(example: Any, *arguments: Any) -> Any:
        if any("question 5" in turn.content for turn in example.turns):
            raise Panic
        return encode(example, *arguments)

    monkeypatch.setattr(clients.tokens, "encode_or_cause", breaks)
    client = open_site(None, BUDGET, **EXAMPLE).clients["anna"]
    assert (client.num_rows, len(client.train) >= 35) == (36, True)
    with pytest.raises(DataError, match="the tokenizer broke down"):
        open_site(None, "")
