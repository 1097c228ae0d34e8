"""Training and evaluation by recorded passes: what is replayed gives what is computed as usual.

The recorder here runs the function again, on what stands in the recording's inputs by then. It shows all but
that CUDA records what it is told, which tests marked `gpu` do.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedllm.engine.engine import Engine
from fedllm.engine.graphs import Shelf
from fedllm.engine.jobs import EvaluationJob, Job
from fedllm.engine.kernels import MaskedKernel
from fedllm.engine.recorded_inputs import RecordedInputs
from tests.engine.test_graphs import eager
from tests.engine.test_passes import Shifted

EXACT = {"rtol": 0.0, "atol": 1e-11}


class Recorder:
    """Records by remembering the function; counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], torch.Tensor], _: object) -> Callable[[], torch.Tensor]:
        self.recorded += 1
        run()

        def replay() -> torch.Tensor:
            self.replayed += 1
            return run()

        return replay


def recorded_by(engine: Engine, recorder: Callable) -> Engine:
    """Let the passes of an engine be recorded, with a kernel that reads all from tensors."""
    engine.bank.kernel = MaskedKernel()
    engine.passes = replace(engine.passes, shelf=Shelf[RecordedInputs](recorder))
    return engine


def some_jobs(engine: Engine, make_job: Callable, make_rows: Callable) -> list[Job]:
    """Three clients whose steps have rows of the same lengths, each time in another order."""
    lengths, jobs = [21, 14, 9, 5], []
    for seed in range(3):
        batches = [
            make_rows(lengths[step % 4 :] + lengths[: step % 4], seed=10 * seed + step)
            for step in range(4 + seed)
        ]
        job = make_job(engine.layout, str(seed), seed, steps=len(batches))
        jobs.append(replace(job, batches=tuple(batches)))
    return jobs


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_recorded_training_gives_the_same_deltas(
    kind: str, clip: float, make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    plain, recorder = make_engine(kind), Recorder()
    engine = recorded_by(make_engine(kind), recorder)
    jobs = [replace(job, example_clip=clip) for job in some_jobs(plain, make_job, make_rows)]
    for found, expected in zip(engine.train(jobs), plain.train(jobs), strict=True):
        torch.testing.assert_close(found.delta, expected.delta, **EXACT)
        torch.testing.assert_close(found.losses, expected.losses, **EXACT)
    assert recorder.replayed > recorder.recorded > 0


def test_recorded_evaluation_gives_the_same_losses(make_engine: Callable, make_rows: Callable) -> None:
    plain, recorder = make_engine("llama"), Recorder()
    engine = recorded_by(make_engine("llama"), recorder)
    vectors = [0.1 * torch.randn(plain.layout.size) for _ in range(2)]
    jobs = [EvaluationJob(str(n), vectors[n % 2], make_rows([9, 30, 4], seed=n)) for n in range(4)]
    expected = [each.loss for each in plain.evaluate(jobs)]
    for _ in range(3):
        assert [each.loss for each in engine.evaluate(jobs)] == pytest.approx(expected, abs=1e-11)
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_recordings_tell_equally_large_adapters_apart(make_engine: Callable) -> None:
    """Adapters of one matrix each, which lies in another layer."""
    engine = make_engine("llama")
    one, *others = engine.layout.matrices
    other = next(each for each in others if vars(each) | {"module": ""} == vars(one) | {"module": ""})
    bank, places, rows = engine.bank, [], torch.zeros(1, 1)
    for matrix in (one, other):
        layout = replace(engine.layout, matrices=(matrix,))
        bank.load(layout, [torch.zeros(layout.size)], [1.0])
        bank.theta_CP = bank.frozen_CQ = bank.scales_C = rows  # where the other lay
        places.append(bank.addresses(backward=False))
    assert places[0] != places[1]


def test_moved_weights_are_not_computed_with_by_an_old_recording(
    make_engine: Callable, make_rows: Callable
) -> None:
    recorder = Recorder()
    engine = recorded_by(make_engine("llama"), recorder)
    jobs = [EvaluationJob("a", torch.zeros(engine.layout.size), make_rows([9]))]
    for _ in range(3):
        engine.evaluate(jobs)
    layer = engine.base.model.get_submodule(engine.layout.matrices[0].module)
    original = layer.weight.data
    layer.weight.data = original.clone()  # as a base delta does
    engine.evaluate(jobs)
    layer.weight.data = original
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_what_cannot_be_recorded_is_computed_as_usual(
    make_engine: Callable, make_job: Callable, make_rows: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], torch.Tensor], _: object) -> Callable[[], torch.Tensor]:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, engine = make_engine("llama"), recorded_by(make_engine("llama"), refuse)
    jobs = some_jobs(plain, make_job, make_rows)
    for found, expected in zip(engine.train(jobs), plain.train(jobs), strict=True):
        torch.testing.assert_close(found.delta, expected.delta, **EXACT)
    assert len(caplog.messages) == 1


def test_objectives_are_recorded_with_their_own_targets(
    make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    plain, recorder = make_engine("llama"), Recorder()
    engine, objective = recorded_by(make_engine("llama"), recorder), Shifted()
    jobs = [replace(job, objective=objective) for job in some_jobs(plain, make_job, make_rows)]
    for found, expected in zip(engine.train(jobs), plain.train(jobs), strict=True):
        torch.testing.assert_close(found.delta, expected.delta, **EXACT)
        torch.testing.assert_close(found.losses, expected.losses, **EXACT)
    assert recorder.replayed > recorder.recorded > 0


def test_dropout_on_a_cpu_is_not_recorded(make_engine: Callable, make_job: Callable) -> None:
    recorder = Recorder()
    engine = recorded_by(make_engine("llama"), recorder)
    list(engine.train([make_job(engine.layout, steps=4, dropout=0.1)]))
    assert not recorder.recorded


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_graph_on_a_gpu_gives_the_bits_of_single_kernels(
    dtype: str, clip: float, make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    """Rows are short enough for attention to keep its order of sums."""
    engine = make_engine("llama", dtype, device="cuda")
    jobs = [replace(job, example_clip=clip) for job in some_jobs(engine, make_job, make_rows)]
    measured = [EvaluationJob(job.client_id, job.start, job.batches[0]) for job in jobs]

    def results() -> list[torch.Tensor]:
        """Return deltas and losses of three rounds, of which the second records and the third replays."""
        deltas, losses = [], []
        for _ in range(3):
            deltas += [result.delta for result in engine.train(jobs)]
            losses += [torch.tensor(each.loss) for each in engine.evaluate(measured)]
        return [*deltas, *losses]

    found, shelf = results(), engine.passes.shelf
    assert shelf is not None
    assert shelf.num_kept > 1
    engine.passes = replace(engine.passes, shelf=Shelf[RecordedInputs](eager))
    assert all(torch.equal(one, other) for one, other in zip(found, results(), strict=True))


@pytest.mark.gpu
def test_graph_on_a_gpu_follows_weights_that_move(make_engine: Callable, make_rows: Callable) -> None:
    engine = make_engine("llama", "bfloat16", device="cuda")
    jobs = [EvaluationJob("a", torch.zeros(engine.layout.size), make_rows([9, 30]))]
    before = [engine.evaluate(jobs)[0].loss for _ in range(3)][-1]
    layer = engine.base.model.get_submodule(engine.layout.matrices[0].module)
    original = layer.weight.data
    layer.weight.data = 2 * original
    moved = [engine.evaluate(jobs)[0].loss for _ in range(3)]
    layer.weight.data = original
    assert len(set(moved)) == 1
    assert moved[0] != before
    assert engine.evaluate(jobs)[0].loss == before
