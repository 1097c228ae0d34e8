"""The client benchmark compares equal work: every peer trains the very adapter that the engine trains."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedllm.config.keys import LoraConfig
from fedllm.data.fields import Example, Turn
from fedllm.engine.engine import Engine
from fedllm.errors import DataError
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import IGNORED, Encoded
from scripts.benchmarks import client
from scripts.benchmarks import cohort as bench_cohort
from scripts.benchmarks.agreement import checked_difference
from scripts.benchmarks.arithmetic import useful_flop
from scripts.benchmarks.client import Options, goals_of, measure, train_resident
from scripts.benchmarks.client_rows import instructions
from scripts.benchmarks.cohort import Cohort, make_cohort, tiny_engine, tiny_model, train_round, within
from scripts.benchmarks.peers.flowertune import train_afresh
from scripts.benchmarks.peers.shared import TOLERANCE, missing_package, quiet_huggingface
from scripts.benchmarks.workloads import (
    Bench,
    Shape,
    Workload,
    make_workload,
    needed_flop,
    shortened,
)
from scripts.reports import report

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
ANSWERS = ("Return it.", "Open a file and read its lines.", "Sort the list in place.", "Raise an error.")
EXAMPLES = tuple(
    Example(turns=(Turn("user", f"def function_{number}()"), Turn("assistant", ANSWERS[number % 4] * 2)))
    for number in range(12)
)
SHAPE = Shape(LocalTraining(steps=3, batch_size=3, learning_rate=1e-2, weight_decay=0.1, clip_norm=0.05), 128)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def bench(load_tiny: Callable[..., BaseModel]) -> Bench:
    base = load_tiny()
    lora = LoraConfig(rank=2, alpha=6.0, target_modules="q_proj,v_proj")
    engine = Engine(base, layout_of(base.model, lora, base.fingerprint))
    return Bench(engine, base.files.folder, "transformers", 0)


@pytest.fixture
def workload(bench: Bench) -> Workload:
    return make_workload(bench.engine, EXAMPLES, SHAPE, client_id="a", seed=0)


def _trl() -> Callable:
    pytest.importorskip("trl", reason="the extra `bench` is not installed")
    from scripts.benchmarks.peers.trl import train_with_trl

    return train_with_trl


@pytest.mark.parametrize("checkpointing", [True, False])
def test_flowertune_kind_of_client_trains_the_engines_adapter(
    checkpointing: bool, bench: Bench, workload: Workload, tmp_path: Path
) -> None:
    ours = train_resident(bench, workload).delta
    with quiet_huggingface():
        theirs = train_afresh(bench.folder, workload, tmp_path, checkpointing=checkpointing)
    assert float(ours.abs().max()) > SHAPE.training.learning_rate
    torch.testing.assert_close(theirs.delta, ours, rtol=0, atol=1e-4)
    assert list(theirs.phases) == ["load", "wrap", "tokenizer", "trainer", "train", "extract"]


@pytest.mark.parametrize("at_best", [False, True])
def test_trl_trains_the_engines_adapter(
    at_best: bool, bench: Bench, workload: Workload, tmp_path: Path
) -> None:
    train_with_trl = _trl()
    ours = train_resident(bench, workload).delta
    with quiet_huggingface():
        theirs = train_with_trl(bench.folder, workload, tmp_path, at_best=at_best)
    torch.testing.assert_close(theirs.delta, ours, rtol=0, atol=1e-4)


def test_pfl_gives_the_engines_weighted_mean_of_a_round(bench: Bench) -> None:
    """In float64, but Llama's norms and pfl's differences stay float32. A second round is the first again."""
    pytest.importorskip("pfl", reason="see scripts/benchmarks/peers/environment.py")
    from scripts.benchmarks.peers.pfl import open_simulation, run_round

    engine = tiny_engine(bench.engine.base, 400, torch.float64)
    training = replace(SHAPE.training, batch_size=2)
    jobs = tuple(
        make_workload(
            engine, EXAMPLES, Shape(replace(training, steps=steps), 128), client_id=name, seed=0
        ).job
        for name, steps in (("a", 1), ("b", 3), ("c", 2))
    )
    ours = train_round(Cohort(engine, jobs))
    simulation = open_simulation(tiny_model(400, torch.float64), engine.layout, jobs)
    with quiet_huggingface():
        first, second = run_round(simulation), run_round(simulation)
    assert float(ours.abs().max()) > 1e-2
    torch.testing.assert_close(first.double(), ours, rtol=0, atol=1e-5)
    assert torch.equal(first, second)


def test_a_round_is_the_mean_of_its_clients_weighted_by_rows(bench: Bench) -> None:
    engine = bench.engine
    jobs = tuple(
        make_workload(
            engine, EXAMPLES, Shape(replace(SHAPE.training, steps=steps), 128), client_id=name, seed=0
        ).job
        for name, steps in (("a", 1), ("b", 3))
    )
    a, b = (result.delta for result in engine.train(jobs))
    torch.testing.assert_close(train_round(Cohort(engine, jobs)), 0.25 * a + 0.75 * b)


def test_another_adapter_is_refused(bench: Bench, workload: Workload) -> None:
    ours = train_resident(bench, workload).delta
    faster = replace(SHAPE.training, learning_rate=1.01 * SHAPE.training.learning_rate)
    job = replace(workload.job, training=faster)
    theirs = train_resident(bench, replace(workload, job=job)).delta
    assert checked_difference({"ours": ours, "theirs": ours}, TOLERANCE, "ours") == 0
    with pytest.raises(RuntimeError, match="theirs trained another adapter"):
        checked_difference({"ours": ours, "theirs": theirs}, TOLERANCE, "ours")
    with pytest.raises(RuntimeError):
        checked_difference({"ours": ours, "theirs": ours * float("nan")}, TOLERANCE, "ours")
    assert (
        checked_difference({"ours": ours, "theirs": ours * (1 + TOLERANCE.limit / 2)}, TOLERANCE, "ours") > 0
    )


def test_workload_counts_its_tokens_and_what_padding_adds(bench: Bench, workload: Workload) -> None:
    lengths = [[len(row.tokens) for row in batch] for batch in workload.job.batches]
    assert [len(batch) for batch in lengths] == [3, 3, 3]
    assert workload.num_tokens == sum(map(sum, lengths))
    assert workload.num_slots == sum(3 * max(batch) for batch in lengths)
    assert workload.num_learnt == sum(row.num_supervised for row in workload.rows)
    assert len(set(workload.examples)) == 9  # drawn without repetition
    brief = shortened(workload, 2)
    assert brief.rows == workload.rows[:2]
    assert brief.examples == workload.examples[:2]
    assert brief.job.training.steps == 1


def test_what_rows_begin_with_is_needed_once(bench: Bench) -> None:
    """Three rows of 9 + 3 tokens: two of the three prefixes need not be computed."""
    prefix = tuple(range(20, 29))
    rows = tuple(
        Encoded((*prefix, 30 + number, 40, 50), (IGNORED,) * 9 + (30 + number, 40, 50)) for number in range(3)
    )
    work = make_workload(bench.engine, EXAMPLES, SHAPE, client_id="a", seed=0)
    work = replace(work, job=replace(work.job, batches=(rows,)))
    alone = Encoded(prefix, (IGNORED,) * 9)
    spared = 2 * useful_flop(bench.model, work.layout, [alone])
    assert needed_flop(bench.model, work) == useful_flop(bench.model, work.layout, rows) - spared
    one = replace(work, job=replace(work.job, batches=(rows[:1],)))
    assert needed_flop(bench.model, one) == useful_flop(bench.model, work.layout, rows[:1])


def test_uneven_rows_come_from_a_folder_of_instructions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither general\.train\.jsonl nor medical\.train\.jsonl"):
        instructions(tmp_path, 0)
    pairs = [{"instruction": f"Say {number}.", "input": "", "output": str(number)} for number in range(20)]
    for name in ("medical.train.jsonl", "general.train.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        source, examples = instructions(tmp_path, 0)
        assert source == name
        assert {example.turns[-1].content for example in examples} <= {str(number) for number in range(20)}


def test_shared_instructions_are_uneven() -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    source, examples = instructions(SHARED_DATA, 0)
    assert source == "general.train.jsonl"
    lengths = [len(example.turns[-1].content) for example in examples]
    assert max(lengths) > 10 * min(lengths)


def test_smaller_vocabulary_keeps_lengths_and_what_is_learnt() -> None:
    row = within(Encoded((1, 70, 90), (IGNORED, IGNORED, 90)), 64)
    assert row == Encoded((1, 6, 26), (IGNORED, IGNORED, 26))


@pytest.mark.soak
def test_cohort_is_eight_clients_of_one_and_two_steps(bench: Bench) -> None:
    jobs = make_cohort(bench.engine.base, 300, 0).jobs
    assert [len(job.batches) for job in jobs] == [1, 2] * 4
    assert len({job.client_id for job in jobs}) == 8
    assert max(token for job in jobs for batch in job.batches for row in batch for token in row.tokens) < 300


def test_a_missing_peer_is_named_once_and_left_out(
    bench: Bench, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = missing_package("no_such_peer")
    assert line == "no_such_peer is not installed, so its column is left out: pip install 'fedllm[bench]'"
    assert missing_package("torch") == ""
    monkeypatch.setattr(client, "missing_package", lambda name: line)
    with quiet_huggingface():
        found = measure(bench, shortened(workload, 2), tmp_path, repetitions=1)
    assert list(found.clients) == ["fedllm", "FlowerTune-like", "no checkpointing"]
    assert 0 <= found.difference <= TOLERANCE.limit


@pytest.mark.slow
def test_quick_report_holds_all_peers_and_is_json(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command on a tiny model: timings mean nothing, the work is the real one."""
    _trl()
    monkeypatch.setattr(client, "open_bench", lambda client, seed: bench)
    figures, found = client.compare(Options(quick=True, repetitions=2), Console(quiet=True), {})
    assert list(figures["rows"]) == ["first sentences"]
    assert list(figures["rows"]["first sentences"]["clients"]) == ["fedllm", "FlowerTune-like", "TRL"]
    assert list(figures["cohorts"]) == [bench_cohort.SMALL]
    assert figures["left_out"] == {}
    goals = {key: goal.goal for key, goal in found.items()}
    assert goals == {"cpu_ratio_vs_flowertune": 2.0, "cpu_ratio_vs_trl": 2.0, "cpu_ratio_vs_pfl": 1.5}
    json.dumps(report("bench_client", figures, found))


def test_nothing_measured_has_no_goal() -> None:
    assert goals_of({}, {}) == {}
