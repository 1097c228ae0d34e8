"""Which class a run allows: a table of what its plan and its log may say."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedllm.chained_log import append
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.runs.folder import DECISIONS, describe_run, write_rounds
from fedllm.runs.records import DistillationRecord, RoundRecord
from strategies.unlearning.guarantee import Guarantee, guarantee_of

CLIENTS = ("anna", "ben", "cleo", "dora")
LATE = {"federation.max-staleness": 2, "aggregation.read-out": "factor-mean"}
ASKED = (("anna", "ben"), ("anna", "dora"), ("anna", "cleo"), ("ben", "cleo"))


def records_of(**changes: Any) -> list[RoundRecord]:
    """Return the records of four rounds; `changes` are those of round 2."""
    records = [RoundRecord(round_num=0)]
    for number, asked in enumerate(ASKED, 1):
        records.append(RoundRecord(round_num=number, asked=asked, **(changes if number == 2 else {})))
    return records


@pytest.fixture
def guarantee(tmp_path: Path) -> Callable[..., Guarantee]:
    """Return a function (client, keys, records, log, rows) -> what a run of these allows."""

    def do(
        client: str = "cleo",
        flat: dict[str, Any] | None = None,
        records: Sequence[RoundRecord] = tuple(records_of()),
        log: Sequence[dict[str, Any]] = (),
        *,
        start: Sequence[dict[str, Any]] = (),
        rows: bool = False,
    ) -> Guarantee:
        keys = {"federation.num-clients": 4, "federation.cohort": 2, "federation.num-rounds": 4}
        describe_run(tmp_path, RunConfig.from_flat({**keys, **(flat or {})}))
        write_rounds(tmp_path, records)
        (tmp_path / DECISIONS).unlink(missing_ok=True)
        append(tmp_path / DECISIONS, *(start or begun()), {"event": "round", "round": 1}, *log)
        return guarantee_of(tmp_path, client, rows=rows)

    return do


def joined(client: str, **changes: Any) -> dict[str, Any]:
    sizes = {"num_train": 5, "num_held_out": 1, "fingerprint": "f" * 64, "site": "", "node": 2}
    return {"event": "joined", "client": client, **sizes, **changes}


def begun(*clients: str) -> list[dict[str, Any]]:
    return [{"event": "begun"}, *map(joined, clients or CLIENTS)]


def test_a_run_goes_back_to_before_the_first_turn(guarantee: Callable) -> None:
    found = {name: guarantee(name) for name in CLIENTS}
    assert {name: each.kind for name, each in found.items()} == dict.fromkeys(CLIENTS, "A")
    assert {name: each.first_round for name, each in found.items()} == {
        "anna": 1,
        "ben": 1,
        "dora": 2,
        "cleo": 3,
    }
    assert [found[name].num_again for name in CLIENTS] == [4, 4, 2, 3]


def test_a_client_that_was_never_asked_costs_nothing(guarantee: Callable) -> None:
    found = guarantee("cleo", records=records_of()[:3])
    assert (found.kind, found.first_round, found.num_again) == ("A", 0, 0)


def test_a_client_that_took_no_part_is_refused(guarantee: Callable) -> None:
    with pytest.raises(ConfigError, match="'eve' took no part; anna, ben, cleo, dora did"):
        guarantee("eve")


@pytest.mark.parametrize(
    ("changes", "first"),
    [({"attempt": 2}, 2), ({"distillation": DistillationRecord(kept=False, reason="")}, 2), ({}, 3)],
)
def test_a_round_that_others_may_have_shaped_is_done_again(
    changes: dict[str, Any], first: int, guarantee: Callable
) -> None:
    assert guarantee("cleo", records=records_of(**changes)).first_round == first


@pytest.mark.parametrize(
    ("flat", "why"),
    [
        ({"federation.selection": "weighted"}, "draws every cohort anew"),
        ({"federation.selection": "poisson"}, "draws every cohort anew"),
        ({"train.control-variates": True, "aggregation.read-out": "factor-mean"}, "from round to round"),
        ({"aggregation.preset": "fedsa"}, "from round to round"),
        ({"personal.mode": "ditto"}, "from round to round"),
        ({"lora.client-ranks": "4,8"}, "lora.client-ranks"),
    ],
)
def test_where_every_round_depends_on_it_all_are_done_again(
    flat: dict[str, Any], why: str, guarantee: Callable
) -> None:
    found = guarantee("cleo", flat)
    assert (found.kind, found.first_round, found.num_again) == ("A", 1, 4)
    assert why in found.why


@pytest.mark.parametrize(("robust", "first"), [("none", 3), ("norm-clip", 1)])
def test_what_others_may_weigh_can_depend_on_a_client(robust: str, first: int, guarantee: Callable) -> None:
    # A robust rule lets nobody weigh more than the lower median: 5, and 7 without cleo. Else ten times that.
    sizes = {"anna": 5, "ben": 7, "cleo": 5, "dora": 40}
    nodes = [joined(name, node=number, num_train=size) for number, (name, size) in enumerate(sizes.items())]
    found = guarantee("cleo", {"aggregation.robust": robust}, start=[{"event": "begun"}, *nodes])
    assert found.first_round == first


@pytest.mark.parametrize(
    ("flat", "changes", "log", "why"),
    [
        ({"federation.selection": "oort"}, {}, [], "losses"),
        ({"federation.selection": "power-of-choice"}, {}, [], "losses"),
        ({"federation.over-selection": 1.5}, {}, [], "when they came"),
        (LATE, {"staleness": {"anna": 1}}, [], "when they came"),
        ({}, {}, [joined("eve")], "set of clients changed"),
        ({}, {}, [joined("anna", num_train=9)], "set of clients changed"),
        ({}, {}, begun("anna", "ben", "cleo"), "set of clients changed"),
    ],
)
def test_where_rounds_cannot_be_those_without_it_class_d_is_left(
    flat: dict[str, Any], changes: dict[str, Any], log: list, why: str, guarantee: Callable
) -> None:
    found = guarantee("cleo", flat, records_of(**changes), log)
    assert found.kind == "D"
    assert why in found.refused["A"]
    assert list(found.refused) == ["A", "B", "C"]


@pytest.mark.parametrize("log", [[joined("anna", node=9)], begun(), [*begun(), joined("ben", node=7)]])
def test_clients_that_come_back_as_they_were_change_nothing(log: list, guarantee: Callable) -> None:
    assert guarantee("cleo", log=log).first_round == 3


@pytest.mark.parametrize(("rows", "first"), [(False, 3), (True, 1)])
def test_fewer_rows_of_a_client_can_move_what_others_weigh(
    rows: bool, first: int, guarantee: Callable
) -> None:
    # The lower median of all is 5, and of all but cleo too; where cleo keeps one row it is 3.
    sizes = {"anna": 5, "ben": 6, "cleo": 8, "dora": 3}
    nodes = [joined(name, node=number, num_train=size) for number, (name, size) in enumerate(sizes.items())]
    flat = {"aggregation.robust": "norm-clip"}
    assert guarantee("cleo", flat, start=[{"event": "begun"}, *nodes], rows=rows).first_round == first


def test_ranks_given_by_name_stay_without_a_client(guarantee: Callable) -> None:
    assert guarantee("cleo", {"lora.client-ranks": "anna:4,ben:8"}).first_round == 3


def test_a_run_private_for_clients_has_forgotten_each_of_them(guarantee: Callable, tmp_path: Path) -> None:
    flat = {"privacy.epsilon": 8.0, "privacy.unit": "client", "federation.cohort": "all"}
    (tmp_path / "privacy.json").write_text(json.dumps({"epsilon": 3.25}))
    found = guarantee("cleo", flat)
    assert (found.kind, found.epsilon, list(found.refused)) == ("B", 3.25, ["A"])
    assert "within epsilon 3.25 at delta 1e-05" in found.why
    assert "budget a second time" in found.refused["A"]
    (tmp_path / "privacy.json").unlink()
    assert guarantee("cleo", flat).epsilon == 8.0  # an unfinished run may still spend all of it


def test_a_run_private_for_rows_has_forgotten_rows_and_no_client(guarantee: Callable) -> None:
    flat = {"privacy.epsilon": 8.0, "privacy.unit": "example", "federation.cohort": "all"}
    whole = guarantee("cleo", flat)
    assert whole.kind == "D"
    assert "hides single rows" in whole.refused["B"]
    assert guarantee("cleo", flat, rows=True).kind == "B"


def test_clients_that_trained_in_groups_are_forgotten_by_group(guarantee: Callable, tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text('{"0": ["anna", "ben", "cleo", "dora"]}')
    found = guarantee("cleo")
    assert (found.kind, list(found.refused)) == ("C", ["A", "B"])


def test_a_run_without_its_log_says_so(guarantee: Callable, tmp_path: Path) -> None:
    guarantee()
    (tmp_path / DECISIONS).unlink()
    with pytest.raises(ConfigError, match=r"decisions\.jsonl: missing"):
        guarantee_of(tmp_path, "cleo")


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"event": "joined"}'])
def test_a_damaged_log_is_named(line: str, guarantee: Callable, tmp_path: Path) -> None:
    guarantee()
    (tmp_path / DECISIONS).write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"decisions\.jsonl: cannot be read"):
        guarantee_of(tmp_path, "cleo")
