"""Clients that are killed, hang or run out of memory while they train: processes, without Flower's own."""

import random
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedllm.config.run_config import RunConfig
from fedllm.runs.records import RoundRecord
from strategies.run import run_federation
from strategies.session import Watch
from tests.process_grid import ProcessGrid, process_grid

# A deadline that a slow machine may miss costs an attempt, and no test counts attempts.
PATIENT = {"federation.max-retries": 1000, "federation.max-failure-rate": 1.0}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA cannot fork"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc"),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Leave threads of matrix products behind, as another test may: no fork may wait for them."""
    torch.set_num_threads(2)
    torch.ones(800, 800) @ torch.ones(800, 800)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def make_config(make_model_folder: Callable, text_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function (**flat) -> the configuration of a federation of ten tiny clients."""

    def make(flat: dict[str, Any]) -> RunConfig:
        values = {
            "run.output": str(tmp_path),
            "model.name": str(make_model_folder()),
            "model.device": "cpu",
            "model.num-threads": 1,  # as in process_grid.py
            "data.source": str(text_file),
            "data.partition": "iid",
            "federation.num-clients": 10,
            "lora.rank": 2,
            "train.local-steps": 2,
            "train.max-length": 48,
            "distill.when": "never",
        }
        return RunConfig.from_flat({**values, **PATIENT, **flat})

    return make


def run(config: RunConfig, grid: ProcessGrid) -> tuple[str, list[RoundRecord]]:
    """Return the digest of a finished run's adapter, and the records of all its attempts."""
    records: list[RoundRecord] = []
    state = run_federation(config, grid, Watch(record=records.append))
    assert state.round_num == config.federation.num_rounds
    return state.adapter.digest, [record for record in records if record.round_num]


def trained(messages: Iterable[Message]) -> list[int]:
    """Return the nodes that messages ask to train."""
    return [one.metadata.dst_node_id for one in messages if one.metadata.message_type == "train"]


def lose_some(grid: ProcessGrid, share: float) -> list[set[int]]:
    """Kill a share of the nodes each time that they are asked to train, and start them again before the next.

    Return the list to which the killed ones are added, round by round.
    """
    generator, killed = random.Random(7), list[set[int]]()

    def kill(messages: list[Message]) -> None:
        if nodes := trained(messages):
            killed.append(set(generator.sample(nodes, round(share * len(nodes)))))
            for node in killed[-1]:
                grid.nodes[node].send(signal.SIGKILL)
                grid.nodes[node].process.join()
                grid.restart((node - 2) % grid.number)

    grid.after_push = kill
    return killed


def test_rounds_go_on_without_those_that_are_killed(make_config: Callable) -> None:
    config = make_config({"federation.num-rounds": 2, "federation.num-clients": 3})
    with process_grid(config, 3) as grid:
        killed = lose_some(grid, 0.3)
        _, records = run(config, grid)
    assert len(records) == 2
    for record, nodes in zip(records, killed, strict=True):
        assert record.lost == {f"client-{(node - 2) % 3:04}": "node unavailable" for node in nodes}
        assert len(record.accepted) == len(record.asked) - 1 >= 1


def test_a_client_that_hangs_costs_its_round_the_deadline(make_config: Callable) -> None:
    flat = {"federation.num-rounds": 3, "federation.num-clients": 3, "federation.round-deadline": 4.0}
    config = make_config(flat)
    with process_grid(config, 3) as grid:
        rounds = list[list[int]]()

        def stop(messages: list[Message]) -> None:
            if nodes := trained(messages):
                rounds.append(nodes)
                grid.nodes[3].send(signal.SIGSTOP if len(rounds) == 1 else signal.SIGCONT)

        grid.after_push = stop
        _, records = run(config, grid)
    assert records[0].lost["client-0001"] == "no reply within 4 s"
    assert all(record.seconds < record.deadline + 5 for record in records)
    assert 3 not in rounds[1]  # it is still busy with the first round


def test_a_client_without_memory_says_so_and_costs_nobody(make_config: Callable) -> None:
    large = {"train.batch-size": 600, "train.local-steps": 1, "train.token-budget": 100_000}  # in one pass
    config = make_config({**large, "federation.num-rounds": 1, "federation.num-clients": 3})
    with process_grid(config, 3) as grid:
        grid.nodes.pop(4).send(signal.SIGKILL)
        grid.restart(2, memory=1)
        _, (record,) = run(config, grid)
    assert record.codes == {"client-0002": "out-of-memory"}
    assert len(record.accepted) == 2


@pytest.mark.soak
def test_twenty_rounds_that_each_lose_a_third_of_their_clients(make_config: Callable) -> None:
    config = make_config({"federation.num-rounds": 20, "federation.round-deadline": 20.0})
    with process_grid(config, 10, tells=False) as grid:
        killed = lose_some(grid, 0.3)
        _, records = run(config, grid)
    assert len(killed) == len(records) >= 20
    for record in records:
        assert record.seconds <= record.deadline + 5
        assert len(record.accepted) >= len(record.asked) - 3
