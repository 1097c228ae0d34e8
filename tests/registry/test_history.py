"""The log of a registry, folded: what each alias points to, and where a rollback leads."""

from collections.abc import Mapping
from typing import Any

import pytest

from fedllm.errors import IntegrityError
from fedllm.registry.history import history_of


def added(number: int) -> dict[str, Any]:
    return {"event": "added", "version": number, "digest": f"d{number}", "signer": "s", "lineage": ""}


def pointed(event: str, number: int, alias: str = "production") -> dict[str, Any]:
    return {"event": event, "version": number, "alias": alias}


THREE = [added(1), added(2), added(3)]


def test_each_alias_points_to_what_it_was_promoted_to_last() -> None:
    history = history_of(
        [*THREE, pointed("promoted", 1), pointed("promoted", 2), pointed("promoted", 3, "next")]
    )
    assert history.current == {"production": 2, "next": 3}
    assert history.next_number == 4


@pytest.mark.parametrize(
    ("promoted", "marked", "earlier"),
    [
        ([1, 2, 3], [], 2),
        ([1, 2, 3], [2], 1),
        ([1, 2, 1], [], 2),
        ([3], [], None),
        ([1, 2], [1], None),
        ([], [], None),
    ],
)
def test_a_rollback_leads_to_the_last_other_unmarked_version(
    promoted: list[int], marked: list[int], earlier: int | None
) -> None:
    marks = [{"event": "marked", "version": number, "reason": "withdrawn"} for number in marked]
    history = history_of([*THREE, *(pointed("promoted", number) for number in promoted), *marks])
    assert history.earlier("production") == earlier


def test_rollbacks_in_a_row_go_further_back() -> None:
    log = [*THREE, *(pointed("promoted", number) for number in (1, 2, 3)), pointed("rolled-back", 2)]
    assert history_of(log).earlier("production") == 1
    assert history_of([*log, pointed("promoted", 3)]).earlier("production") == 2


def test_notes_change_nothing() -> None:
    assert history_of([*THREE, {"event": "drift", "version": 99}]) == history_of(THREE)


@pytest.mark.parametrize(
    "entry",
    [
        added(5),
        pointed("promoted", 4),
        pointed("rolled-back", 1),
        {"event": "marked", "version": 1},
        {"version": 1},
    ],
)
def test_an_entry_that_cannot_follow_is_named(entry: Mapping[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="line 4: "):
        history_of([*THREE, entry])
