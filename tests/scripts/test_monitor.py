"""Health and metrics of a supervised run."""

import sys
import threading
from typing import Any

import httpx
import pytest

from fedllm.errors import ConfigError, MissingExtraError
from fedllm.runs.records import RoundRecord, TrainingRecord
from scripts.runtimes.monitor import Monitor, monitored
from tests.site_builder import wait_for

WELL = {"healthy": True, "restarts": 2, "run": "trial"}


def test_metrics_follow_the_rounds() -> None:
    pytest.importorskip("prometheus_client")
    monitor = Monitor("trial", 7, lambda: WELL)
    for number, loss in ((1, 2.5), (2, 2.25)):
        training = TrainingRecord(loss=loss)
        monitor.record(RoundRecord(round_num=number, bytes_up=10, accepted=("a",), training=training))
    monitor.record(RoundRecord(round_num=3, applied=False))
    with monitored(monitor, 0) as port:
        told = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 404
    lines = dict(line.rsplit(" ", 1) for line in told.splitlines() if not line.startswith("#"))
    figures = {name.removesuffix('{run="trial"}'): float(value) for name, value in lines.items()}
    assert figures["fedllm_round"] == 2
    assert figures["fedllm_planned_rounds"] == 7
    assert figures["fedllm_train_loss"] == 2.25
    assert figures["fedllm_received_bytes_total"] == 20
    assert figures["fedllm_restarts"] == 2
    assert figures["fedllm_accepted_clients"] == 0


def test_health_is_the_state_of_the_moment() -> None:
    pytest.importorskip("prometheus_client")
    state: dict[str, Any] = dict(WELL)
    with monitored(Monitor("trial", 1, lambda: state), 0) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/health")
        assert (answer.status_code, answer.json()) == (200, WELL)
        state["healthy"] = False
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503


def test_a_taken_port_is_one_line() -> None:
    pytest.importorskip("prometheus_client")
    monitor = Monitor("trial", 1, lambda: WELL)
    with (
        monitored(monitor, 0) as port,
        pytest.raises(ConfigError, match=f"--monitor {port}: .* another port"),
    ):
        monitored(monitor, port).__enter__()


def test_a_monitor_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedllm\[serve\]'"):
        Monitor("trial", 1, lambda: WELL)


def test_a_monitor_ends_with_its_run_however_that_ends() -> None:
    pytest.importorskip("prometheus_client")
    before = threading.active_count()
    with pytest.raises(KeyError), monitored(Monitor("trial", 1, lambda: WELL), 0):
        raise KeyError
    wait_for(lambda: threading.active_count() == before, "the end of the monitor's thread")
