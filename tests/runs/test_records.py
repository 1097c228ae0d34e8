import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.runs.records import record_from_dict, record_to_dict, record_to_line
from fedllm.types import ClientEvaluation, RoundRecord

names = st.text(min_size=1, max_size=8)
numbers = st.floats(-1e9, 1e9)
name_lists = st.lists(names, max_size=4).map(tuple)
by_name = st.dictionaries(names, numbers, max_size=4)
records = st.builds(
    RoundRecord,
    round_num=st.integers(0, 99),
    attempt=st.integers(1, 4),
    asked=name_lists,
    accepted=name_lists,
    lost=st.dictionaries(names, st.text(max_size=20), max_size=4),
    weights=by_name,
    train_loss=st.none() | numbers,
    train_losses=by_name,
    client_seconds=by_name,
    staleness=st.dictionaries(names, st.integers(1, 9), max_size=4),
    held_out=by_name,
    personal_held_out=by_name,
    num_tokens=st.integers(0, 10**12),
    bytes_down=st.integers(0, 10**15),
    bytes_up=st.integers(0, 10**15),
    seconds=numbers,
    learning_rate=numbers,
    applied=st.booleans(),
    delta_norm=numbers,
    rho=st.none() | numbers,
    kept_energy=st.none() | numbers,
    adapter=st.text("0123456789abcdef", max_size=64),
)


@settings(deadline=None, max_examples=60)
@given(records)
def test_a_record_survives_its_line(record: RoundRecord) -> None:
    line = record_to_line(record)
    assert "\n" not in line
    values = json.loads(line)
    assert record_from_dict(values) == record
    assert values["round"] == record.round_num
    assert values["mean_held_out"] == record.mean_held_out


def test_numbers_that_are_not_finite_become_null() -> None:
    record = RoundRecord(round_num=1, rho=math.nan, delta_norm=math.inf, weights={"a": math.nan, "b": 1.0})
    values = json.loads(record_to_line(record))
    assert (values["rho"], values["delta_norm"], values["weights"]) == (None, None, {"a": None, "b": 1.0})
    assert record_to_dict(record)["round"] == 1


def test_the_mean_held_out_loss_is_over_clients_and_absent_where_none_was_measured() -> None:
    assert RoundRecord(round_num=1, held_out={"a": 1.0, "b": 4.0}).mean_held_out == 2.5
    assert RoundRecord(round_num=1).mean_held_out is None


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (math.log(7), 7.0), (701.0, math.inf)])
def test_perplexity_is_the_exponential_of_the_loss(loss: float, expected: float) -> None:
    evaluation = ClientEvaluation(client_id="a", loss=loss, num_tokens=1, num_rows=1)
    assert evaluation.perplexity == pytest.approx(expected)
