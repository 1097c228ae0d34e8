"""The figures of a run for Prometheus: of its rounds, and of its clients what their sites let out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedllm.monitoring.drift import Chart, DriftRule, add_losses
from fedllm.monitoring.open_metrics import Metric, Sample, write_metrics
from fedllm.runs.records import RoundRecord

# What the last round says, None where it says nothing of it.
ROUND_GAUGES: tuple[tuple[Metric, Callable[[RoundRecord], float | None]], ...] = (
    (Metric("round", "The last complete round."), lambda one: one.round_num if one.applied else None),
    (Metric("train_loss", "Mean loss of the last round in nats per token."), lambda one: one.training.loss),
    (
        Metric("held_out_loss", "Mean held-out loss, where it was last measured."),
        lambda one: one.mean_held_out,
    ),
    (
        Metric("accepted_clients", "Clients whose update counted in the last round."),
        lambda one: len(one.accepted),
    ),
    (Metric("lost_clients", "Clients whose update was lost in the last round."), lambda one: len(one.lost)),
    (Metric("round_seconds", "Duration of the last round."), lambda one: one.seconds),
    (
        Metric("round_deadline_seconds", "How long the last round would have waited."),
        lambda one: one.deadline or None,
    ),
    (
        Metric("epsilon", "Privacy budget that the run has spent."),
        lambda one: one.privacy.epsilon if one.privacy else None,
    ),
)
RECEIVED = Metric("received_bytes", "Bytes of updates from clients.", is_counter=True)
SENT = Metric("sent_bytes", "Bytes of requests to clients.", is_counter=True)
CLIENT_LOSS = Metric("client_held_out_loss", "Held-out loss of a client in nats per token.")
CLIENT_DRIFT = Metric("client_drift", "How far a client's loss has risen against its history (CUSUM).")
DRIFT_BOUND = Metric("drift_bound", "The drift of a client above which there is an alarm.")
DRIFT_ALARMS = Metric("drift_alarms", "Alarms that a client's held-out loss has risen.", is_counter=True)


def run_samples(run: str, records: Sequence[RoundRecord], rule: DriftRule) -> list[Sample]:
    """Return the figures of a run's records so far, oldest first."""
    about = {"run": run}
    found = []
    for metric, read in ROUND_GAUGES:
        values = [value for record in records if (value := read(record)) is not None]
        found += [Sample(metric, float(values[-1]), about)] if values else []
    found.append(Sample(RECEIVED, float(sum(record.bytes_up for record in records)), about))
    found.append(Sample(SENT, float(sum(record.bytes_down for record in records)), about))
    charts: Mapping[str, Chart] = {}
    losses: dict[str, float] = {}
    alarms: dict[str, int] = {}
    for record in records:
        charts, drifted = add_losses(charts, record.held_out, rule)
        losses |= record.held_out
        alarms |= {client: alarms.get(client, 0) + 1 for client in drifted}
    return found + client_samples(about, losses, charts, alarms, rule)


def client_samples(
    about: Mapping[str, str],
    losses: Mapping[str, float],
    charts: Mapping[str, Chart],
    alarms: Mapping[str, int],
    rule: DriftRule,
) -> list[Sample]:
    """Return the last losses of clients (nats per token), their charts and how often each drifted."""
    found = [Sample(DRIFT_BOUND, rule.bound(len(losses)), about)] if losses else []
    for client, loss in sorted(losses.items()):
        labels = {**about, "client": client}
        found.append(Sample(CLIENT_LOSS, float(loss), labels))
        found.append(Sample(CLIENT_DRIFT, charts.get(client, Chart()).sum, labels))  # none since a rollback
        found.append(Sample(DRIFT_ALARMS, float(alarms.get(client, 0)), labels))
    return found


def write_run_metrics(path: Path, run: str, records: Sequence[RoundRecord]) -> None:
    """Replace the OpenMetrics file of a run; raises as `write_metrics`."""
    write_metrics(path, run_samples(run, records, DriftRule()))
