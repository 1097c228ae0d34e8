"""The figures of a pipeline for Prometheus."""

from fedllm.monitoring.open_metrics import Metric, Sample
from fedllm.monitoring.run_metrics import client_samples
from fedllm.registry.registry import PRODUCTION
from scripts.pipeline.state import PipelineState
from scripts.pipeline.steps import Pipeline

_IN_USE = Metric("version_in_use", "The version of the registry that is in use; 0 = none.")
_VERSIONS = Metric("versions", "Versions in the registry.")
_LOOKS = Metric("looks", "Looks at the clients so far.", is_counter=True)
_RUNS = Metric("runs", "Runs that the pipeline has begun.", is_counter=True)
_SPENT = Metric("pipeline_epsilon", "Epsilon of all runs of the pipeline together.")
_LOOKED = Metric("look_time", "When the last look was, in seconds since 1970.")


def pipeline_samples(pipeline: Pipeline, state: PipelineState) -> list[Sample]:
    """Return the figures after a tick."""
    about, history = {"model": pipeline.registry.name}, pipeline.history()
    values = {
        _IN_USE: history.current.get(PRODUCTION, 0),
        _VERSIONS: len(history.added),
        _LOOKS: state.looks,
        _RUNS: state.cycle,
        _SPENT: state.spent,
        _LOOKED: pipeline.now(),
    }
    found = [Sample(metric, float(value), about) for metric, value in values.items()]
    return found + client_samples(about, state.losses, state.charts, state.alarms, pipeline.rule)
