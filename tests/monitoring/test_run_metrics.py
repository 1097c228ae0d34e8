"""The OpenMetrics file of a run, as Prometheus' own parser reads it."""

from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fedllm.monitoring.drift import DriftRule
from fedllm.monitoring.open_metrics import Metric, Sample, open_metrics
from fedllm.monitoring.run_metrics import run_samples, write_run_metrics
from fedllm.runs.records import RoundRecord, TrainingRecord


def values_of(text: str) -> dict[tuple[str, str], float]:
    """Return (name of the sample, client) -> value."""
    families = text_string_to_metric_families(text)
    return {
        (one.name, one.labels.get("client", "")): one.value for family in families for one in family.samples
    }


def records(losses: list[float]) -> list[RoundRecord]:
    steady = {"b": 2.0}
    return [
        RoundRecord(round_num=number, held_out={"a": loss, **steady}, bytes_up=10, bytes_down=20)
        for number, loss in enumerate(losses)
    ]


def test_the_file_has_the_figures_of_a_run(tmp_path: Path) -> None:
    last = RoundRecord(round_num=3, training=TrainingRecord(loss=1.5), bytes_up=10, accepted=("a", "b"))
    write_run_metrics(tmp_path / "run.prom", "night", [*records([3.0, 2.0, 1.0]), last])
    found = values_of((tmp_path / "run.prom").read_text())
    assert found["fedllm_round", ""] == 3
    assert found["fedllm_train_loss", ""] == 1.5
    assert found["fedllm_held_out_loss", ""] == 1.5, "that of round 2: round 3 measured none"
    assert found["fedllm_received_bytes_total", ""] == 40
    assert (found["fedllm_client_held_out_loss", "a"], found["fedllm_drift_alarms_total", "a"]) == (1.0, 0)
    assert list(tmp_path.iterdir()) == [tmp_path / "run.prom"], "no half-written file is left"


def test_a_rise_of_one_client_is_an_alarm_of_that_client() -> None:
    found = values_of(open_metrics(run_samples("night", records([3.0] * 6 + [3.4]), DriftRule())))
    assert [found["fedllm_drift_alarms_total", client] for client in "ab"] == [1, 0]


def test_a_run_whose_losses_stay_at_home_names_no_client() -> None:
    text = open_metrics(run_samples("night", [RoundRecord(round_num=1)], DriftRule()))
    assert "client=" not in text
    assert ("fedllm_held_out_loss", "") not in values_of(text)


@pytest.mark.parametrize("name", ['a "b"', "back\\slash", "two\nlines", "Grüße"])
def test_any_name_of_a_client_can_be_read_back(name: str) -> None:
    text = open_metrics([Sample(Metric("round", 'Of "it".'), 1.0, {"client": name})])
    assert values_of(text) == {("fedllm_round", name): 1.0}
