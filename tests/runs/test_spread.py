import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.runs.spread import spread_and_losses, spread_of

by_client = st.dictionaries(st.text(min_size=1, max_size=4), st.floats(0, 100), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(by_client)
def test_the_numbers_are_those_of_the_clients(losses: dict[str, float]) -> None:
    found = spread_of(losses)
    assert found.mean == pytest.approx(statistics.fmean(losses.values()))
    assert found.worst == max(losses.values()) == losses[found.worst_client]
    assert found.spread == max(losses.values()) - min(losses.values())
    assert found.deviation == pytest.approx(statistics.pstdev(losses.values()), abs=1e-6)


def test_of_equally_bad_clients_the_first_by_name_is_named() -> None:
    assert spread_of({"c": 2.0, "b": 2.0, "a": 1.0}).worst_client == "b"


def test_a_description_holds_the_numbers_and_every_client() -> None:
    assert spread_and_losses({"a": 1.0, "b": 3.0}) == {
        "mean": 2.0,
        "worst": 3.0,
        "worst_client": "b",
        "spread": 2.0,
        "deviation": 1.0,
        "clients": {"a": 1.0, "b": 3.0},
    }
