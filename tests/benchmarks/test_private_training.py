"""The DP benchmark on a model of a few thousand weights: both sides clip the same gradients."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.errors import MissingExtraError
from fedllm.models.chat import IGNORED
from scripts.benchmarks import private_training
from scripts.benchmarks.agreement import delta_difference
from scripts.benchmarks.models import TINY, random_rows
from scripts.benchmarks.options import ModelOptions
from scripts.benchmarks.peers import opacus as bench_opacus
from scripts.benchmarks.peers.opacus import OpacusTrainer, pad
from scripts.benchmarks.private_training import (
    FEDLLM,
    HOOKS,
    NOISELESS,
    NOT_PRIVATE,
    Bench,
    goals_of,
    main,
    make_job,
    noised,
    open_bench,
)
from scripts.reports import Spread

CPU = torch.device("cpu")

needs_opacus = pytest.mark.skipif(
    importlib.util.find_spec("opacus") is None, reason="needs Opacus: pip install 'fedllm[bench]'"
)
quiet = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@pytest.fixture(autouse=True)
def _small(small_shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        private_training, "ROWS", {"docstrings": ((11, 5, 7), 0.25), "full rows": ((12,), 1.0)}
    )


def test_rows_are_padded_at_the_right_and_learn_nothing_there() -> None:
    padded = pad(random_rows((4, 2), 64, 0, 0.5), CPU)
    assert padded.tokens.shape == padded.labels.shape == padded.mask.shape == (2, 4)
    assert padded.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert padded.labels[1, 2:].tolist() == [IGNORED, IGNORED]


def test_goals_are_the_worst_of_all_workloads() -> None:
    def workload(over_plain: float, over_hooks: float) -> dict[str, Any]:
        variants = {
            name: {"seconds_over_not_private": Spread(0.5, value, 9.0)}
            for name, value in ((FEDLLM, over_plain), (NOISELESS, 0.1))  # of which only the first is judged
        }
        return {"variants": variants, "fedllm_over_hooks": Spread(0.1, over_hooks, 9.0)}

    goals = goals_of({"a": workload(1.0, 0.5), "b": workload(1.06, 0.99)})
    assert {name: (goal.value, goal.met) for name, goal in goals.items()} == {
        "dp_over_non_private": (1.06, False),
        "dp_over_opacus_hooks": (0.99, True),
    }


def test_without_opacus_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_opacus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs Opacus: pip install 'fedllm\[bench\]'"):
        main(ModelOptions(quick=True, model=TINY))


def _engine_gradient(engine: Engine, job: Job) -> torch.Tensor:
    """Return the clipped mean gradient of a job's first step."""
    first = replace(job, batches=job.batches[:1], training=replace(job.training, steps=1))
    # A correction of zero changes nothing, and makes the job tell its gradient.
    (result,) = engine.train([replace(first, correction=torch.zeros_like(job.start))])
    assert result.gradient is not None
    return result.gradient


def _opacus_gradient(trainer: OpacusTrainer, job: Job) -> torch.Tensor:
    """Return the clipped mean that Opacus leaves at the weights before its AdamW would step."""
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

    trainer.load(job.start)
    optimizer = (DPOptimizerFastGradientClipping if trainer.ghost else DPOptimizer)(
        torch.optim.SGD(trainer.weights, lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=job.example_clip,
        expected_batch_size=job.training.batch_size,
    )
    if trainer.ghost:
        trainer.module.max_grad_norm = job.example_clip
    trainer.backward(job.batches[0], optimizer)
    optimizer.step()
    gradient = torch.cat([weight.grad.reshape(-1) for weight in trainer.weights])
    optimizer.zero_grad()
    return gradient


@pytest.fixture
def bench() -> Bench:
    return open_bench(TINY, "cpu", "all-linear", 0, 1, dtype="float64")


@needs_opacus
@quiet
@pytest.mark.parametrize("rows", ["docstrings", "full rows"])
def test_engine_and_opacus_give_the_same_clipped_mean_gradient(rows: str, bench: Bench) -> None:
    """Opacus adds 1e-6 to every norm before it divides by it, hence the tolerance in float64."""
    job = make_job(bench, 4, rows)
    norms = bench.hooks.example_norms(job)
    assert float(norms.min()) <= job.example_clip < float(norms.max()), "some are clipped and some are not"
    ours = _engine_gradient(bench.engine, job)
    for trainer in (bench.hooks, bench.ghost):
        theirs = _opacus_gradient(trainer, job)
        assert float((theirs - ours).norm() / ours.norm()) < 1e-5
    unclipped = _engine_gradient(bench.engine, replace(job, example_clip=1e9))
    assert float((unclipped - ours).norm() / ours.norm()) > 1e-2


@needs_opacus
@quiet
def test_comparison_of_deltas_notices_missing_clipping(bench: Bench) -> None:
    job = make_job(bench, 4, "docstrings")
    private = private_training.train(bench.engine, job)
    assert delta_difference(bench.hooks.train(job)[None], private, 0.95) < 1e-4
    assert delta_difference(bench.ghost.train(job)[None], private, 0.95) < 1e-4
    plain = private_training.train(bench.engine, replace(job, example_clip=0.0))
    assert delta_difference(plain, private, 0.95) > 1e-2


@needs_opacus
@quiet
def test_judged_variant_has_the_noise_of_a_private_client(bench: Bench) -> None:
    """The deviation is z * clip / batch; without it the same job is the one that Opacus agrees with."""
    job = make_job(bench, 4, "docstrings")
    private = noised(job, bench.seed)
    assert private.noise is not None
    assert private.noise.deviation == pytest.approx(private_training.NOISE_MULTIPLIER * job.example_clip / 4)
    without = private_training.train(bench.engine, job)
    assert delta_difference(private_training.train(bench.engine, private), without, 0.95) > 1e-2
    assert torch.equal(private_training.train(bench.engine, replace(private, noise=None)), without)


@needs_opacus
@quiet
def test_opacus_leaves_the_engines_base_model_alone(bench: Bench) -> None:
    job = make_job(bench, 2, "docstrings")
    model = bench.engine.base.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bench.hooks.train(job)
    bench.ghost.train(job)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    shared = {weight.data_ptr() for weight in model.parameters()}
    assert shared <= {weight.data_ptr() for weight in bench.hooks.module.parameters()}, "no second copy"


@needs_opacus
def test_a_run_on_the_tiny_model_ends_in_one_json_object(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = tmp_path / "figures.json"
    main(ModelOptions(quick=True, model=TINY, device="cpu", json=True, output=kept))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(kept.read_text())
    assert set(result["goals"]) == {"dp_over_non_private", "dp_over_opacus_hooks"}
    workloads = result["figures"]["models"]["tiny"]
    assert set(workloads) == {"docstrings, batch 4", "docstrings, batch 16"}
    for figures in workloads.values():
        assert 0 <= figures["delta_difference"] <= 1e-3
        assert list(figures["variants"])[:4] == [NOT_PRIVATE, FEDLLM, NOISELESS, HOOKS]
