"""The benchmark of rounds measures the same work everywhere, and counts what every process costs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clients import protect as protecting
from fedllm.config.run_config import RunConfig
from fedllm.engine.engine import Engine
from scripts.benchmarks import round
from scripts.benchmarks.memory import peak_rss
from scripts.benchmarks.models import save_tiny_model, write_rows
from scripts.benchmarks.processes import Change, ProcessTree, Sample, Watched
from scripts.benchmarks.round import (
    BARE,
    LOCAL,
    SIMULATION,
    compared_figures,
    memory_per_client,
    part_figures,
    show_runtimes,
)
from scripts.benchmarks.round_worker import (
    PARTS,
    RoundEnd,
    Trace,
    federate,
    read_trace,
    timed_parts,
    train_only,
)
from scripts.benchmarks.runs import UNMEASURED, Run, check_same_work, process_kind, trace_of
from scripts.reports import spread
from strategies.aggregation import combine

ROUNDS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    """Three clients of the tiny model, three rounds."""
    folder = tmp_path_factory.mktemp("bench")
    return RunConfig.from_flat(
        {
            **UNMEASURED,
            "model.name": str(save_tiny_model(folder / "model")),
            "model.device": "cpu",
            "data.source": str(write_rows(folder / "rows.jsonl", 3, 6)),
            "federation.num-clients": 3,
            "federation.num-rounds": ROUNDS,
            "train.local-steps": 2,
            "train.batch-size": 2,
            "lora.rank": 2,
            "run.output": str(folder / "runs"),
        }
    )


@pytest.fixture(scope="module")
def traces(config) -> dict[str, Trace]:
    return {"bare": train_only(config), "local": federate(config)}


def test_a_bare_loop_trains_what_a_run_trains(traces):
    bare, local = traces["bare"], traces["local"]
    assert bare.tokens == local.tokens
    assert bare.accepted == local.accepted == (3,) * ROUNDS
    assert bare.first_losses == pytest.approx(local.first_losses, rel=1e-9)
    assert bare.num_values == local.num_values > 0
    check_same_work("local", local, bare)


def test_work_that_differs_is_refused(traces):
    bare = traces["bare"]
    with pytest.raises(RuntimeError, match="tokens a round"):
        check_same_work("other", replace(bare, tokens=(1,) * ROUNDS), bare)
    losses = {name: loss + 0.01 for name, loss in bare.first_losses.items()}
    with pytest.raises(RuntimeError, match="did not train on the rows"):
        check_same_work("other", replace(bare, first_losses=losses), bare)


def test_the_parts_of_a_round_add_up_to_less_than_the_round(traces):
    local = traces["local"]
    run = Run(started=local.ends[0].time, ended=local.ends[-1].time, trace=local)
    for period, parts in zip(run.periods, run.parts(), strict=True):
        assert set(parts) == set(PARTS)
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) < period
    figures = part_figures([run])
    assert set(figures) == {*PARTS, "other"}
    assert figures["other"] > 0


def test_runtimes_are_compared_with_the_bare_loop(config, traces):
    began = min(trace.ends[0].time for trace in traces.values()) - 1
    bare, local = (Run(began, trace.ends[-1].time, trace) for trace in (traces["bare"], traces["local"]))
    found = compared_figures(config, [{BARE: bare, LOCAL: local, SIMULATION: local}])
    assert found["runtimes"][BARE]["wall_ratio"] == spread([1.0])
    assert found["runtimes"][LOCAL]["wall_ratio"].median == pytest.approx(
        sum(local.periods) / sum(bare.periods)
    )
    assert found["simulation_beyond_local_s"] == 0
    show_runtimes(Console(quiet=True), found)


def test_timing_leaves_the_functions_as_they_were():
    before = (Engine.train, protecting.protect, combine.add)
    with timed_parts():
        assert protecting.protect is not before[1]
    assert (Engine.train, protecting.protect, combine.add) == before


def test_a_trace_survives_its_journey(traces):
    assert (
        read_trace(json.dumps({**vars(traces["local"]), "ends": [vars(e) for e in traces["local"].ends]}))
        == (traces["local"])
    )


def test_a_run_is_start_rounds_and_close():
    ends = tuple(
        RoundEnd(time, cpu, {"train": cpu / 2}) for time, cpu in ((15.0, 1.0), (17.0, 2.5), (21.0, 5.0))
    )
    run = Run(10.0, 22.0, Trace(ends, (1, 1, 1), (1, 1, 1), {}, 1, 1))
    assert run.periods == [2.0, 4.0]
    assert run.cpu_periods == [1.5, 2.5]
    assert run.start == 15.0 - 10.0 - 3.0
    assert run.close == 1.0
    assert run.parts() == [{"train": 0.75}, {"train": 1.25}]


def test_rounds_of_a_watched_run_are_read_off_its_file():
    """Lines appear at 10, 12 and 16; round 2 was missed by the looks and is put between its neighbours."""
    watched = Watched(
        started=0.0,
        ended=20.0,
        samples=(Sample(0.0, {}, 5), Sample(20.0, {"clients": 40.0, "Ray": 10.0}, 7)),
        changes=(Change(10.0, 2), Change(16.0, 4)),
    )
    training = {"num_tokens": 7, "losses": {"a": 1.0}}
    records = [{"accepted": ["a"], "training": training}] * 3
    trace = trace_of(watched, records)
    assert [end.time for end in trace.ends] == [10.0, 13.0, 16.0]
    assert [end.cpu for end in trace.ends] == [25.0, 32.5, 40.0]
    assert trace.ends[0].parts == {"clients": 20.0, "Ray": 5.0}
    assert (trace.tokens, trace.accepted, trace.peak_rss) == ((7, 7, 7), (1, 1, 1), 7)


@pytest.mark.parametrize(
    ("name", "command", "kind"),
    [
        ("ray::ClientAppActor", "ray::ClientAppActor", "clients"),
        ("flwr-simulation", "python bin/flwr-simulation --token x", "server"),
        ("python", "python -u site-packages/ray/autoscaler/monitor.py", "Ray"),
        ("raylet", "site-packages/ray/core/raylet", "Ray"),
        ("flower-superlin", "python bin/flower-superlink --simulation", "SuperLink"),
        ("python", "python -m fedllm run", "fedllm run"),
    ],
)
def test_processes_of_a_simulation_are_told_apart(name, command, kind):
    assert process_kind(name, command) == kind


BURN = """
import subprocess, sys, time

def burn(word):  # then wait until the other side has looked
    began = time.process_time()
    while time.process_time() < began + 0.5:
        pass
    print(word, flush=True)
    input()

if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "child"])
    burn("parent")
else:
    burn("child")
"""


def test_a_tree_counts_children_that_have_ended(tmp_path: Path):
    script = tmp_path / "burn.py"
    script.write_text(BURN)
    kinds = {True: "child", False: "parent"}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin
        assert parent.stdout
        tree = ProcessTree(parent.pid, lambda name, line: kinds[line.endswith("child")])
        samples = [tree.sample()]
        for word in ("child", "parent"):  # the child has ended when the parent burns
            assert parent.stdout.readline() == f"{word}\n"
            samples.append(tree.sample())
            parent.stdin.write("\n")
            parent.stdin.flush()
    assert parent.returncode == 0
    assert samples[-1].cpu["child"] >= 0.5
    assert samples[-1].cpu["parent"] >= 0.5
    totals = [sum(sample.cpu.values()) for sample in samples]
    assert totals == sorted(totals)


def test_the_peak_of_memory_never_falls():
    before = peak_rss()
    held = bytearray(32_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_rss() >= before
    del held
    assert peak_rss() >= before > 1_000_000


def test_memory_grows_by_adapters_per_client():
    def cohort(clients: int, megabytes: float) -> dict[str, Any]:
        return {"clients": clients, "adapter_values": 1000, "peak_rss_mb": spread([megabytes])}

    cohorts = {"most": cohort(110, 503.2), "fewest": cohort(10, 502.4)}
    assert memory_per_client(cohorts) == pytest.approx(2.0)  # 0.8 MB over 100 clients of 4 kB
    assert memory_per_client({"only": cohort(10, 500.0)}) is None


@pytest.mark.soak
@pytest.mark.parametrize("part", ["cohorts", "both"])
def test_the_benchmark_prints_one_object(part, capsys, tmp_path):
    kept = tmp_path / "figures.json"
    round.main(round.Options(quick=True, json=True, part=part, clients=2, rounds=3, sizes="2", output=kept))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(kept.read_text())
    assert set(result) == {"name", "figures", "goals"}
    assert set(result["figures"]["cohorts"]) == {"svd, 2 clients"}
    assert result["goals"]["clients_in_a_round"]["met"] is True
    if part == "both":
        assert set(result["figures"]["runtimes"]["runtimes"]) == {BARE, LOCAL, SIMULATION}
