"""Figures as an OpenMetrics text file, which Prometheus' node exporter or any scraper of files reads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from fedllm.files import write_file

_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(frozen=True)
class Metric:
    """A family of figures; `name` is without the prefix `fedllm_`, and of a counter without `_total`."""

    name: str
    meaning: str
    is_counter: bool = False


@dataclass(frozen=True)
class Sample:
    """A figure of a metric; the labels say of what, such as {"run": "night"}."""

    metric: Metric
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


def open_metrics(samples: Iterable[Sample]) -> str:
    """Return samples in the OpenMetrics text format 1.0, all of a metric together as it demands."""
    lines = []
    for metric, group in groupby(sorted(samples, key=lambda one: one.metric.name), lambda one: one.metric):
        name = f"fedllm_{metric.name}"
        lines.append(f"# TYPE {name} {'counter' if metric.is_counter else 'gauge'}")
        lines.append(f"# HELP {name} {metric.meaning.translate(_ESCAPED)}")
        for sample in group:
            labels = ",".join(f'{key}="{text.translate(_ESCAPED)}"' for key, text in sample.labels.items())
            lines.append(f"{name}{'_total' * metric.is_counter}{{{labels}}} {sample.value!r}")
    return "\n".join([*lines, "# EOF"]) + "\n"


def write_metrics(path: Path, samples: Iterable[Sample]) -> None:
    """Replace the file of samples in one step, so that a scraper never reads half of it.

    Raises:
        OSError: it cannot be written.
    """
    write_file(path, open_metrics(samples))
