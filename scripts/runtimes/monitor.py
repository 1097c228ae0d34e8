"""What a supervised run says of itself over HTTP on loopback: /health for a probe, /metrics for Prometheus.

Both are read from what the supervisor and the records of rounds say anyway; no client is named.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from fedllm.errors import ConfigError, MissingExtraError
from fedllm.monitoring.run_metrics import RECEIVED, ROUND_GAUGES, SENT
from fedllm.runs.records import RoundRecord


class Monitor:
    """The figures of one run; `health` returns its state of the moment: "healthy", "restarts" and more."""

    def __init__(self, run: str, num_rounds: int, health: Callable[[], dict[str, Any]]):
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge
        except ModuleNotFoundError:
            raise MissingExtraError(
                "--monitor needs prometheus-client: pip install 'fedllm[serve]'"
            ) from None
        self.health, self.registry = health, CollectorRegistry()

        def gauge(name: str, meaning: str) -> Any:
            return Gauge(f"fedllm_{name}", meaning, ["run"], registry=self.registry).labels(run)

        def counter(name: str, meaning: str) -> Any:
            return Counter(f"fedllm_{name}", meaning, ["run"], registry=self.registry).labels(run)

        gauge("planned_rounds", "Rounds that the run is to do.").set(num_rounds)
        gauge("healthy", "1 while all processes of the server live.").set_function(
            lambda: float(bool(health()["healthy"]))
        )
        gauge("restarts", "Restarts of the server's processes since it was started.").set_function(
            lambda: float(health()["restarts"])
        )
        self._gauges = [
            (gauge(metric.name, metric.meaning), read) for metric, read in ROUND_GAUGES
        ]  # a round that does not say a figure leaves it as it was
        self._time = gauge("round_completed_time", "When the last round was seen, in seconds since 1970.")
        self._up, self._down = (counter(one.name, one.meaning) for one in (RECEIVED, SENT))

    def record(self, record: RoundRecord) -> None:
        """Take over the figures of a round."""
        for shown, read in self._gauges:
            if (value := read(record)) is not None:
                shown.set(value)
        self._time.set_to_current_time()
        self._up.inc(record.bytes_up)
        self._down.inc(record.bytes_down)

    def answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        """Answer one request (WSGI)."""
        from prometheus_client import make_wsgi_app

        if environ["PATH_INFO"] == "/metrics":
            answered: Iterable[bytes] = make_wsgi_app(self.registry)(environ, start)
            return answered
        is_known = environ["PATH_INFO"] == "/health"
        content = self.health() if is_known else {"error": "there are /health and /metrics"}
        status = "404 Not Found"
        if is_known:
            status = "200 OK" if content["healthy"] else "503 Service Unavailable"
        start(status, [("Content-Type", "application/json")])
        return [json.dumps(content).encode() + b"\n"]


@contextmanager
def monitored(monitor: Monitor, port: int) -> Iterator[int]:
    """Answer on a loopback port for the length of the block, and yield the port; 0 takes a free one.

    Raises:
        ConfigError: the port cannot be had.
    """
    try:
        server = make_server("127.0.0.1", port, monitor.answer, handler_class=_Quiet)
    except OSError as error:
        raise ConfigError(f"--monitor {port}: {error.strerror}; choose another port") from None
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


class _Quiet(WSGIRequestHandler):
    """Logs no request."""

    def log_message(self, *unused: Any) -> None:
        """Log nothing."""
