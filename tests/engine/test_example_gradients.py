"""DP-SGD in the fused engine: the textbook loop, empty batches, rows that are no numbers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.adapters.layout import at_rank
from fedllm.adapters.parts import part_of, part_size, whole_of
from fedllm.engine import step_noise as noises
from fedllm.engine.engine import Engine
from fedllm.engine.example_gradients import SlotClips, add_clipped, slot_clips
from fedllm.engine.flat_row import FlatRow
from fedllm.engine.job_rows import rows_of_jobs
from fedllm.engine.jobs import Job, StepNoise
from fedllm.engine.kernels import LoopKernel, MaskedKernel
from fedllm.engine.layers import attached
from fedllm.engine.step_noise import step_noise, step_noises
from fedllm.engine.steps import step_gradients
from fedllm.models.attention import ragged
from fedllm.models.chat import IGNORED, Encoded
from fedllm.privacy.keys import derived_key
from fedllm.privacy.noise import SecretStream, gaussian
from tests.engine.no_waiting import no_waiting

KEY = bytes(range(32))
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def plain_noise(noise: StepNoise, step: int, mean: torch.Tensor) -> torch.Tensor:
    """Return noise that no gradient changes."""
    return gaussian(SecretStream(derived_key(noise.key, "step", step)), mean.numel(), noise.deviation)


@pytest.fixture
def plainly_noised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rounding change no noise: what is compared with here rounds otherwise."""
    monkeypatch.setattr(noises, "step_noise", plain_noise)


def gradient_of(engine: Engine, job: Job, theta: torch.Tensor, row: Any) -> torch.Tensor:
    """Return the gradient of one row's mean token loss at `theta`, by a pass of its own."""
    alone = replace(job, batches=((row,),), example_clip=0.0, noise=None)
    engine.bank.load(engine.layout, [theta], [engine.layout.scale], job.trained)
    with attached(engine.base.model, engine.bank), ragged(engine.base.model):
        return step_gradients(engine.passes, engine.limits, [alone], 0)[0][0].clone()


def textbook(engine: Engine, job: Job) -> torch.Tensor:
    """Return the delta of DP-SGD with AdamW, one row at a time (Abadi et al. 2016, algorithm 1)."""
    theta = job.start.double().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([theta], lr=job.training.learning_rate, weight_decay=0.0)
    assert job.noise is not None
    for step, batch in enumerate(job.batches):
        total = torch.zeros(part_size(engine.layout, job.trained), dtype=torch.float64)
        for row in batch:
            single = gradient_of(engine, job, theta.detach(), row)
            total += single * min(1.0, job.example_clip / float(single.norm()))
        mean = total / job.training.batch_size + plain_noise(job.noise, step, total)
        theta.grad = whole_of(engine.layout, mean, job.trained)
        optimizer.step()
    return theta.detach() - job.start.double()


def private(job: Job, trained: str, sizes: tuple[int, ...], key: bytes = KEY) -> Job:
    """Return a job of DP-SGD whose batches have other sizes than the expected one."""
    rows = [row for batch in job.batches for row in batch]
    batches, begin = [], 0
    for size in sizes:
        batches.append(tuple(rows[begin : begin + size]))
        begin += size
    noise = StepNoise(key, 0.01)
    return replace(job, batches=tuple(batches), example_clip=0.3, noise=noise, trained=trained)


@pytest.mark.usefixtures("plainly_noised")
@pytest.mark.parametrize("trained", ["b", "both"])
@pytest.mark.parametrize("token_budget", [40, 100_000])
def test_the_engine_is_the_textbook_loop(
    trained: str, token_budget: int, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", token_budget=token_budget)
    jobs = [
        private(make_job(engine.layout, "a", 0), trained, (4, 0, 1), KEY),
        private(make_job(engine.layout, "b", 1), trained, (1, 3, 2), bytes(32)),
    ]
    for job, result in zip(jobs, engine.train(jobs), strict=True):
        torch.testing.assert_close(result.delta.double(), textbook(engine, job), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("plainly_noised")
def test_batches_may_all_be_empty(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama")
    job = private(make_job(engine.layout), "b", (0, 0))
    (result,) = engine.train([job])
    assert (result.num_rows, result.num_tokens, result.loss) == (0, 0, 0.0)
    torch.testing.assert_close(result.delta.double(), textbook(engine, job), rtol=1e-6, atol=1e-9)
    assert result.delta.any()  # noise all the same: silence would tell that nobody was drawn


def test_one_row_moves_the_clipped_sum_by_at_most_the_clip(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama")
    job = private(make_job(engine.layout, steps=1, batch_size=5), "both", (5,))

    def total(rows: Any) -> torch.Tensor:
        engine.bank.load(engine.layout, [job.start], [engine.layout.scale], "both")
        with attached(engine.base.model, engine.bank), ragged(engine.base.model):
            alone = [replace(job, batches=(rows,))]
            return 5 * step_gradients(engine.passes, engine.limits, alone, 0)[0][0].clone()

    rows = job.batches[0]
    for missing in range(5):
        moved = total(rows) - total(rows[:missing] + rows[missing + 1 :])
        assert float(moved.norm()) <= job.example_clip * (1 + 1e-9)


def summed(jobs: list[Job], owners: list[int], grad_SP: torch.Tensor, sums_S: torch.Tensor) -> torch.Tensor:
    """Return the jobs' sums of clipped gradients [A, P]."""
    norms_S = torch.linalg.vector_norm(grad_SP, dim=1)
    clips = slot_clips(jobs, owners, norms_S)
    lost_S = clips.lost(norms_S, sums_S)
    total_AP = grad_SP.new_zeros(len(jobs), grad_SP.shape[1])
    add_clipped(total_AP, grad_SP, clips.factors(norms_S, lost_S), clips.owners_S, lost_S)
    return total_AP


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_row_whose_gradient_is_no_number_counts_as_zero(
    value: float, make_job: Callable, make_engine: Callable
) -> None:
    layout = make_engine("llama").layout
    jobs = [private(make_job(layout), "b", (2,))]
    grad_SP = torch.tensor([[3.0, 4.0], [value, 1.0]])
    sums_B = torch.tensor([1.0, value], dtype=torch.float64)
    clipped = summed(jobs, [0, 0], grad_SP, sums_B) * jobs[0].training.batch_size
    expected = torch.tensor([[3.0, 4.0]]) / 5 * 0.3
    if value == 1e30:  # a float32 norm cannot hold it
        assert not grad_SP[1].any()
    torch.testing.assert_close(clipped, expected)


@pytest.mark.usefixtures("plainly_noised")
@pytest.mark.parametrize("kernel", [LoopKernel(), MaskedKernel()], ids=["loop", "masked"])
def test_a_row_that_diverges_loses_no_other_row_of_its_pass(
    kernel: object, make_engine: Callable, make_job: Callable
) -> None:
    """The masked kernel mixes 0 times its gradient into its neighbours', and 0 times NaN is NaN."""
    engine, poison = make_engine("llama"), 4
    engine.bank.kernel = kernel
    jobs = [private(make_job(engine.layout, name, seed), "both", (3,)) for seed, name in enumerate("ab")]
    bad = Encoded((poison, 7, 8), (IGNORED, 7, 8))

    def overflow(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == poison)[..., None], torch.inf)

    def trained(rows: Any) -> list[torch.Tensor]:
        asked = [replace(jobs[0], batches=((*jobs[0].batches[0], *rows),)), jobs[1]]
        return [result.delta for result in engine.train(asked)]

    handle = engine.base.model.get_input_embeddings().register_forward_hook(overflow)
    try:
        for with_it, without in zip(trained([bad]), trained([]), strict=True):
            torch.testing.assert_close(with_it, without, rtol=1e-6, atol=1e-9)
            assert without.any()
    finally:
        handle.remove()


@pytest.mark.usefixtures("plainly_noised")
@pytest.mark.parametrize("kernel", [LoopKernel(), MaskedKernel()], ids=["loop", "masked"])
def test_a_client_that_diverged_changes_no_private_one(
    kernel: object, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama")
    engine.bank.kernel = kernel
    lost, sound = (private(make_job(engine.layout, name, n), "both", (3,)) for n, name in enumerate("ab"))
    lost = replace(lost, start=torch.full_like(lost.start, torch.nan))
    (alone,) = engine.train([sound])
    found = list(engine.train([lost, sound]))
    assert found[0].delta.isnan().any()
    assert alone.delta.any()
    torch.testing.assert_close(found[1].delta, alone.delta, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_a_row_that_is_no_number_on_its_way_back_stays_alone(
    device: str, dtype: str, bound: float, make_engine: Callable, make_job: Callable
) -> None:
    """Whatever computes the model: its states are spoilt above it, and the gradients on their way down."""
    engine, poison = make_engine("llama", dtype, device=device), 4
    jobs = [private(make_job(engine.layout, name, seed), "both", (3,)) for seed, name in enumerate("ab")]
    bad = Encoded((poison, 7, 8), (IGNORED, 7, 8))
    trunk = engine.passes.trunk

    def spoilt(flat: FlatRow) -> torch.Tensor:
        is_bad_N = flat.tokens_T[flat.predicting_N] == poison
        states_ND: torch.Tensor = trunk(flat)
        return states_ND * torch.where(is_bad_N, torch.nan, 1.0).to(states_ND.dtype)[:, None]

    engine.passes = replace(engine.passes, trunk=spoilt)

    def gradient(rows: Any) -> torch.Tensor:
        asked = [replace(jobs[0], batches=((*jobs[0].batches[0], *rows),)), jobs[1]]
        engine.bank.load(engine.layout, [job.start for job in jobs], [engine.layout.scale] * 2)
        with engine.passes.attached():
            return step_gradients(engine.passes, engine.limits, asked, 0)[0].clone()

    with_it, without = gradient([bad]), gradient([])
    for one, other in zip(with_it, without, strict=True):
        assert float((one - other).norm()) <= bound * float(other.norm()) > 0


def test_a_plain_job_that_diverges_is_not_silenced(make_job: Callable, make_engine: Callable) -> None:
    layout = make_engine("llama").layout
    grad_SP = torch.tensor([[float("nan"), 1.0]])
    assert summed([make_job(layout)], [0], grad_SP, torch.ones(1)).isnan().any()


def test_noise_falls_on_what_a_job_trains_at_its_own_rank(make_engine: Callable, make_job: Callable) -> None:
    layout = make_engine("llama").layout
    narrow = at_rank(layout, 1)
    wide_job = private(make_job(layout), "b", (1,))
    plain = replace(make_job(layout), trained="b")
    narrow_job = replace(wide_job, start=torch.zeros(narrow.size), layout=narrow)
    rows = rows_of_jobs([wide_job, plain, narrow_job], layout)
    size = part_size(layout, "b")
    grad_AP = torch.zeros(3, size, dtype=torch.float64)
    noise = step_noises(rows, grad_AP.device)
    noise.add(grad_AP, 0)
    assert bool((grad_AP[0] != 0).all())
    assert not grad_AP[1].any()
    own = part_of(narrow, rows.unstack(2, grad_AP[2]), "b")
    assert int((grad_AP[2] != 0).sum()) == len(own) == part_size(narrow, "b")
    again = torch.zeros_like(grad_AP)
    noise.add(again, 1)
    assert float((again[0] * grad_AP[0]).mean().abs()) < 0.01**2 * 3.3 / size**0.5


def test_another_gradient_never_gets_the_same_noise() -> None:
    """Under one noise the difference of two means would be bare, as where a base model was changed."""
    noise, mean = StepNoise(KEY, 1.0), torch.linspace(-1, 1, 999)
    rounded = torch.nextafter(mean, torch.ones(1))
    first = step_noise(noise, 0, mean)
    assert torch.equal(first, step_noise(noise, 0, mean.clone()))
    for other in (step_noise(noise, 0, rounded), step_noise(noise, 1, mean)):
        assert abs(float((first * other).mean())) < 3.3 / 999**0.5
    assert not step_noise(noise, 0, mean[:0]).numel()


def test_noise_of_two_training_runs_cannot_be_subtracted(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama")
    job = private(make_job(engine.layout, steps=1, batch_size=3), "b", (3,))
    loud = replace(job, noise=StepNoise(KEY, 1e3))
    start, other = ({"start": job.start}, {"start": job.start * 1.01})
    rows = rows_of_jobs([loud], engine.layout)
    noises = []
    for begin in (start, other):
        engine.bank.load(engine.layout, [begin["start"]], [engine.layout.scale], "b")
        with attached(engine.base.model, engine.bank), ragged(engine.base.model):
            gradient = step_gradients(engine.passes, engine.limits, [replace(loud, **begin)], 0)[0].clone()
        noised = gradient.clone()
        step_noises(rows, noised.device).add(noised, 0)
        noises.append((noised - gradient)[0])
    assert float((noises[0] - noises[1]).norm()) > 0.5 * float(noises[0].norm())


class Launches(TorchDispatchMode):
    """Counts what would be launched on a device; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def test_clipping_reads_nothing_back_from_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that only claim to be on a GPU: whoever asks for a value of theirs gets an exception."""
    pytest.importorskip("triton")
    calls: list[Any] = []
    monkeypatch.setattr("fedllm.engine.example_gradients.sums_as_a_cpu", lambda device: True)
    monkeypatch.setattr("fedllm.engine.triton.clipped_sum.add_clipped_sum", lambda *tensors: calls.append(1))
    with FakeTensorMode():
        ones = partial(torch.ones, device="cuda")
        clips = SlotClips(ones(4, dtype=torch.int64), ones(4), ones(4), ones(4, dtype=torch.bool))
        grad_SP, total_AP, sums_S = ones(4, 9), ones(2, 9), ones(4)
        with Launches() as launches:
            norms_S = torch.linalg.vector_norm(grad_SP, dim=1)
            lost_S = clips.lost(norms_S, sums_S)
            add_clipped(total_AP, grad_SP, clips.factors(norms_S, lost_S), clips.owners_S, lost_S)
    assert len(calls) == 1
    assert launches.number <= 16  # whatever the number of jobs, rows and layers


@pytest.mark.gpu
def test_a_private_step_on_a_gpu_never_waits_for_it(make_engine: Callable, make_job: Callable) -> None:
    from fedllm.engine.triton.lora import TritonKernel

    engine = make_engine("llama", "float32", device="cuda")
    engine.bank.kernel = TritonKernel()  # the other one mixes rows, and asks whether one of them is lost
    jobs = [private(make_job(engine.layout, name, seed), "b", (3, 3)) for seed, name in enumerate("ab")]
    list(engine.train(jobs))  # what is tried or measured once waits
    rows, bank = rows_of_jobs(jobs, engine.layout), engine.bank
    bank.load(engine.layout, [job.start for job in jobs], [engine.layout.scale] * 2, "b")
    noise = step_noises(rows, bank.device)
    with engine.passes.attached(), no_waiting():
        gradients, _ = step_gradients(engine.passes, engine.limits, jobs, 0)
        noise.add(gradients, 0)
    assert bool(torch.isfinite(gradients).all())
