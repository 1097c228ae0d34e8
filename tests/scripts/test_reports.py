"""What benchmarks and experiments report."""

import pytest

from scripts.reports import Goal, Spread, megabytes, report

pytestmark = pytest.mark.research


def test_a_goal_is_reached_from_below_or_kept_from_above() -> None:
    assert [Goal(value, 1.0).met for value in (0.9, 1.0, 1.1)] == [False, True, True]
    assert [Goal(value, 1.0, at_most=True).met for value in (0.9, 1.0, 1.1)] == [True, True, False]
    assert not Goal(float("nan"), 1.0, at_most=True).met


def test_a_report_has_the_same_form_for_both_kinds_of_goals() -> None:
    goals = {"more": Goal(2.0, 1.0), "less": Goal(2.0, 1.0, at_most=True)}
    assert report("x", {"spread": Spread(1.0, 2.0, 3.123456)}, goals) == {
        "name": "x",
        "figures": {"spread": {"min": 1.0, "median": 2.0, "max": 3.1235}},
        "goals": {
            "more": {"value": 2.0, "goal": 1.0, "met": True},
            "less": {"value": 2.0, "goal": 1.0, "met": False},
        },
    }


def test_unknown_memory_has_a_sign_of_its_own() -> None:
    assert megabytes(None) == "?"
    assert megabytes(2_600_000) == "3"
