"""Links and nodes in trouble under Flower's own processes: three nodes, each behind a proxy."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedllm.config.run_config import RunConfig
from fedllm.runs.records import RoundRecord, record_from_dict
from fedllm.site_policy import load_policy
from scripts.deploying.certificates import new_node_key
from scripts.runtimes.processes import Link, register, superexec, superlink, temporary_link
from scripts.runtimes.site import Site, running_site
from scripts.runtimes.submitting import submit
from tests.proxy import Proxy, Trouble, proxy

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]
LONGEST = 1200.0  # seconds, of a test on a slow machine
SAME = {"federation.num-rounds": 2}  # of runs whose adapters are compared


@dataclass(frozen=True, eq=False)
class Deployment:
    """A hardened SuperLink and a site of three nodes; node i reaches it through `proxies[i]`."""

    link: Link
    site: Site
    proxies: list[Proxy]
    values: dict[str, Any]

    def start(self, name: str, **flat: Any) -> Path:
        """Submit a run and return its folder."""
        config = RunConfig.from_flat({**self.values, "run.name": name, **SAME, **flat})
        submit(self.link, config, {})
        return Path(self.values["run.output"]) / name

    def pids(self, node: int) -> list[int]:
        """Return the processes of a node, which all have its Flower home in their environment."""
        home = self.site.socket.parents[1] / str(node) / "home"
        mark, found = f"FLWR_HOME={home}\0".encode(), []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (
                    mark in (place / "environ").read_bytes()
                    and b"guard.py" not in (place / "cmdline").read_bytes()
                ):
                    found.append(int(place.name))
        return found

    def signal(self, node: int, number: int) -> None:
        """Send a signal to every process of a node but its guards."""
        for pid in self.pids(node):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def calm(self) -> None:
        """End all trouble."""
        for each in self.proxies:
            each.trouble = Trouble()


def wait_for(what: str, is_there: Callable[[], object]) -> None:
    ends = time.monotonic() + LONGEST
    while not is_there():
        assert time.monotonic() < ends, f"{what} does not come"
        time.sleep(0.1)


def rounds(folder: Path) -> list[RoundRecord]:
    """Return the records of a run's rounds so far."""
    file = folder / "rounds.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [record for record in (record_from_dict(json.loads(line)) for line in lines) if record.round_num]


def finished(folder: Path) -> list[RoundRecord]:
    """Wait for the end of a run, which must be its completion, and return its rounds."""
    wait_for(f"the end of {folder.name}", (folder / "result.json").exists)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed", result
    return rounds(folder)


@pytest.fixture(scope="module")
def deployment(
    make_model_folder: Callable, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("runs")
    values = {
        "run.output": str(folder),
        "model.name": str(make_model_folder()),
        "model.device": "cpu",
        "model.num-threads": 1,
        "data.source": str(text_file),
        "data.partition": "iid",
        "federation.num-clients": 3,
        "federation.join-deadline": 300.0,
        "federation.round-deadline": 600.0,
        "federation.max-retries": 20,
        "federation.max-failure-rate": 1.0,
        "lora.rank": 64,
        "train.local-steps": 2,
        "train.max-length": 48,
        "train.token-budget": 1,
        "distill.when": "never",
    }
    with ExitStack() as stack:
        link = stack.enter_context(temporary_link(is_hardened=True))
        assert link.credentials
        stack.enter_context(superlink(link))
        stack.enter_context(superexec(link))
        proxies = [stack.enter_context(proxy(link.port)) for _ in range(3)]
        nodes = {}
        for index, through in enumerate(proxies):
            key = link.folder / f"node-{index}.key"
            register(link, new_node_key(key))
            nodes[str(index)] = {
                "superlink": through.address,
                "root-certificates": str(link.credentials.authority),
                "private-key": str(key),
                "partition-id": index,
                "num-partitions": 3,
            }
        file = link.folder / "site.toml"
        own = {"site": {"state-path": str(folder / "state")}, "allow": {"server-paths": True}}
        file.write_text(tomli_w.dumps({**own, "nodes": nodes}))
        site = stack.enter_context(running_site(load_policy(file), logs=link.folder))
        yield Deployment(link, site, proxies, values)


@pytest.fixture(autouse=True)
def _calm(deployment: Deployment) -> Iterator[None]:
    yield
    deployment.calm()
    for node in range(3):
        deployment.signal(node, signal.SIGCONT)


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> str:
    """Return the adapter of a run without any trouble."""
    records = finished(deployment.start("undisturbed"))
    assert [len(record.accepted) for record in records] == [3, 3]
    return records[-1].adapter


def test_a_slow_link_changes_no_bit(deployment: Deployment, undisturbed: str) -> None:
    deployment.proxies[0].trouble = Trouble(rate=200_000, delay=0.02)
    records = finished(deployment.start("slow"))
    assert records[-1].adapter == undisturbed
    assert all(record.seconds <= record.deadline + 5 for record in records)


def test_connections_that_are_cut_cost_at_most_their_node(deployment: Deployment) -> None:
    """Whoever was cut off asks again; where Flower gives up, that client loses the round and nobody else."""
    deployment.proxies[1].trouble = Trouble(cut_after=900_000)  # above what one request takes
    records = finished(deployment.start("cut"))
    assert deployment.proxies[1].num_cut > 0
    assert all(set(record.lost) <= {"client-0001"} for record in records)


@pytest.mark.parametrize("fault", ["stopped", "stalled"])
def test_who_hangs_costs_a_round_its_deadline_and_comes_back(deployment: Deployment, fault: str) -> None:
    flat = {"federation.num-rounds": 6, "federation.round-deadline": 60.0}
    folder = deployment.start(fault, **flat)
    wait_for("the first round", lambda: rounds(folder))
    if fault == "stopped":
        deployment.signal(2, signal.SIGSTOP)
    else:
        deployment.proxies[2].trouble = Trouble(is_stalled=True)
    wait_for("a round without it", lambda: rounds(folder)[-1].lost)
    deployment.signal(2, signal.SIGCONT)
    deployment.calm()
    records = finished(folder)
    assert all(record.seconds <= record.deadline + 5 for record in records)
    lost = {client for record in records for client in record.lost}
    assert lost <= {"client-0002"}


def test_a_killed_program_of_a_node_costs_its_round(deployment: Deployment) -> None:
    folder = deployment.start("killed", **{"federation.num-rounds": 4, "train.local-steps": 200})
    wait_for("the first round", lambda: rounds(folder))

    resting = set(deployment.pids(1))
    wait_for("its next message", lambda: set(deployment.pids(1)) - resting)
    for pid in set(deployment.pids(1)) - resting:
        os.kill(pid, signal.SIGKILL)
    records = finished(folder)
    assert all(set(record.lost) <= {"client-0001"} for record in records)
    assert len(records[-1].accepted) == 3  # it is back
