import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import CheckpointError
from fedllm.messages import ClientEvaluation
from fedllm.runs.records import (
    AggregationRecord,
    DistillationLosses,
    DistillationRecord,
    DistillationTeachers,
    DistillationTexts,
    LossChange,
    PrivacyRecord,
    RoundRecord,
    TrainingRecord,
    record_from_dict,
    record_to_dict,
    record_to_line,
)

names = st.text(min_size=1, max_size=8)
numbers = st.floats(-1e9, 1e9)
name_lists = st.lists(names, max_size=4).map(tuple)
by_name = st.dictionaries(names, numbers, max_size=4)
changes = st.builds(LossChange, numbers, numbers)
losses = st.builds(
    DistillationLosses,
    base=numbers,
    ensemble=numbers,
    held_out=changes,
    error=st.none() | numbers,
    domains=st.dictionaries(names, changes, max_size=3),
    own=st.none() | changes,
    clients=st.none() | changes,
)
steps = st.builds(
    DistillationRecord,
    kept=st.booleans(),
    reason=st.text(max_size=20),
    texts=st.builds(DistillationTexts, number=st.integers(0, 99)),
    teachers=st.builds(
        DistillationTeachers,
        kind=st.sampled_from(["", "posterior", "uniform"]),
        entropy=st.none() | numbers,
        weights=st.dictionaries(names, by_name, max_size=3),
    ),
    losses=st.none() | losses,
    num_tokens=st.integers(0, 10**12),
    seconds=numbers,
)
records = st.builds(
    RoundRecord,
    round_num=st.integers(0, 99),
    attempt=st.integers(1, 4),
    asked=name_lists,
    accepted=name_lists,
    lost=st.dictionaries(names, st.text(max_size=20), max_size=4),
    weights=by_name,
    staleness=st.dictionaries(names, st.integers(1, 9), max_size=4),
    held_out=by_name,
    personal_held_out=by_name,
    bytes_down=st.integers(0, 10**15),
    bytes_up=st.integers(0, 10**15),
    seconds=numbers,
    applied=st.booleans(),
    training=st.builds(
        TrainingRecord,
        loss=st.none() | numbers,
        losses=by_name,
        seconds=by_name,
        num_tokens=st.integers(0, 10**12),
        learning_rate=numbers,
    ),
    aggregation=st.builds(
        AggregationRecord,
        delta_norm=numbers,
        rho=st.none() | numbers,
        kept_energy=st.none() | numbers,
        silenced=name_lists,
    ),
    privacy=st.none()
    | st.builds(PrivacyRecord, epsilon=numbers, noise_multiplier=st.none() | numbers, clip=numbers),
    distillation=st.none() | steps,
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
    measured = AggregationRecord(rho=math.nan, delta_norm=math.inf)
    record = RoundRecord(round_num=1, aggregation=measured, weights={"a": math.nan, "b": 1.0})
    values = json.loads(record_to_line(record))
    assert (values["aggregation"]["rho"], values["aggregation"]["delta_norm"]) == (None, None)
    assert values["weights"] == {"a": None, "b": 1.0}
    assert record_to_dict(record)["round"] == 1


def test_the_mean_held_out_loss_is_over_measured_clients() -> None:
    assert RoundRecord(round_num=1, held_out={"a": 1.0, "b": 4.0}).mean_held_out == 2.5
    assert RoundRecord(round_num=1).mean_held_out is None


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (math.log(7), 7.0), (701.0, math.inf)])
def test_perplexity_is_the_exponential_of_the_loss(loss: float, expected: float) -> None:
    evaluation = ClientEvaluation(client_id="a", loss=loss, num_tokens=1, num_rows=1)
    assert evaluation.perplexity == pytest.approx(expected)


@pytest.mark.parametrize("change", [{"rho": 0.1}, {"training": {"speed": 1}}])
def test_a_record_of_another_version_is_refused_in_a_line(change: dict[str, Any]) -> None:
    values = json.loads(record_to_line(RoundRecord(round_num=1)))
    with pytest.raises(CheckpointError, match=str(next(iter(change.get("training", change))))):
        record_from_dict({**values, **change})


@pytest.mark.parametrize(
    ("before", "after", "ensemble", "closed"),
    [
        (3.0, 2.5, 2.0, 0.5),
        (3.0, 3.5, 2.0, -0.5),
        (3.0, 2.0, 2.0, 1.0),
        (2.0, 1.9, 2.0, None),
        (2.0, 1.9, 2.5, None),
        (2.0, math.nan, 1.0, None),
    ],
)
def test_the_gap_closed_is_a_share_of_the_way_to_the_ensemble(
    before: float, after: float, ensemble: float, closed: float | None
) -> None:
    losses = DistillationLosses(base=9.0, ensemble=ensemble, held_out=LossChange(before, after))
    assert losses.gap_closed == (closed if closed is None else pytest.approx(closed))


def test_a_student_that_diverged_is_read_back_as_not_a_number() -> None:
    losses = DistillationLosses(base=9.0, ensemble=2.0, held_out=LossChange(3.0, math.nan))
    step = DistillationRecord(kept=False, reason="the student diverged", losses=losses)
    values = record_to_dict(RoundRecord(round_num=1, distillation=step))
    assert values["distillation"]["losses"]["held_out"] == {"before": 3.0, "after": None}
    read = record_from_dict(values).distillation
    assert read is not None
    assert read.losses is not None
    assert math.isnan(read.losses.held_out.after)
