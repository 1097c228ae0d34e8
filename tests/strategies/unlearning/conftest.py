"""Small real runs of one client a round, by the tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clients.client_app import app
from fedllm.config.run_config import RunConfig
from fedllm.runs.checkpoint import ServerState
from scripts.runtimes.local import local_grid
from strategies.run import run_federation
from strategies.session import SILENT, Watch

ONE_A_ROUND = {"federation.cohort": 1, "federation.num-rounds": 6, "train.local-steps": 1}


def done(config: RunConfig, watch: Watch = SILENT) -> ServerState:
    return run_federation(config, local_grid(config, app), watch)


@pytest.fixture
def config_of(make_config: Callable, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function (name of a run, **flat overrides) -> its configuration."""
    return lambda name, **flat: make_config(
        {**ONE_A_ROUND, "run.output": str(tmp_path), "run.name": name, **flat}
    )
