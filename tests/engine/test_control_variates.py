"""SCAFFOLD's parts: with plain gradient steps they are the paper's, in the engine they do what they say."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from clients.control_variates import change_of, changed
from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix
from fedllm.engine.gradient_terms import control_correction
from fedllm.engine.jobs import Result
from fedllm.engine.plain import train_plainly
from fedllm.messages import ClientUpdate, LocalTraining
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from strategies.control_variates import ControlSum, control_of

EXACT = {"rtol": 0, "atol": 1e-12}
LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5),), 1, 1.0, "f" * 64)
NUM_CLIENTS, STEPS, RATE = 6, 8, 0.05
FREE = LocalTraining(steps=STEPS, batch_size=1, learning_rate=RATE, weight_decay=0.0, clip_norm=1e6)


class Quadratics:
    """Clients with losses (x - o_i)^T H_i (x - o_i) / 2, so unlike that the mean of local steps is wrong."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = LAYOUT.size
        self.optima = 2 * torch.randn(NUM_CLIENTS, size, generator=generator, dtype=torch.float64)
        self.curves = 0.2 + 6 * torch.rand(NUM_CLIENTS, size, generator=generator, dtype=torch.float64)

    @property
    def best(self) -> torch.Tensor:
        """The minimum of the mean loss."""
        return (self.curves * self.optima).sum(0) / self.curves.sum(0)

    def gradient(self, x_AP: torch.Tensor, clients: list[int]) -> torch.Tensor:
        return self.curves[clients] * (x_AP - self.optima[clients])


def federate(num_rounds: int, *, is_corrected: bool, cohort_size: int = NUM_CLIENTS, payload: str = "fp32"):
    """Return (x, c, the c_i) of SGD clients after some rounds, made of the parts a real run is made of."""
    losses, generator = Quadratics(), torch.Generator().manual_seed(1)
    x = torch.zeros(LAYOUT.size, dtype=torch.float64)
    control = AdapterState(LAYOUT, torch.zeros(LAYOUT.size))
    own = [torch.zeros(LAYOUT.size) for _ in range(NUM_CLIENTS)]
    for round_num in range(num_rounds):
        clients = torch.randperm(NUM_CLIENTS, generator=generator)[:cohort_size].tolist()
        corrections = torch.stack([(control.vector - own[client]).double() for client in clients])
        theta = x.repeat(len(clients), 1)
        used = corrections if is_corrected else 0 * corrections
        correction = control_correction(used, theta, [FREE] * len(clients))
        assert correction is not None
        for _ in range(STEPS):
            grads = losses.gradient(theta, clients)
            correction.apply(grads)
            theta = theta - RATE * grads
        total = ControlSum(NUM_CLIENTS, torch.zeros(LAYOUT.size, dtype=torch.float64))
        for row, client in enumerate(clients):
            gradient = correction.sum_CP[row] / STEPS
            by_the_paper = -corrections[row] + (x - theta[row]) / (STEPS * RATE)
            if is_corrected:
                torch.testing.assert_close(gradient, by_the_paper, rtol=0, atol=1e-9)
            result = Result("a", theta[row] - x, 0.0, 1, 1, 0.0, gradient)
            change = change_of(result, own[client])
            own[client] = changed(own[client], change, payload)
            update = ClientUpdate(
                client_id="a",
                round_num=round_num,
                rank=1,
                delta=change[:0],
                weight=1.0,
                num_tokens=1,
                train_loss=0.0,
                control_delta=changed(torch.zeros(LAYOUT.size), change, payload),
            )
            total.add(update)
        x = theta.mean(0)
        before = ServerState(round_num, control, control=control)
        after, _ = total.close(before, before, RoundRecord(round_num=round_num, accepted=("a",)))
        assert after.control is not None
        control = after.control
    return x, control, own


def test_correction_finds_the_optimum_that_averaging_misses() -> None:
    best = Quadratics().best
    with_base_delta, _, _ = federate(60, is_corrected=False)
    found, _, _ = federate(60, is_corrected=True)
    assert float((with_base_delta - best).norm()) > 0.1
    assert float((found - best).norm()) < 1e-4


@pytest.mark.parametrize("payload", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("cohort_size", [1, 3, NUM_CLIENTS])
def test_c_stays_the_mean_of_the_clients_own(cohort_size: int, payload: str) -> None:
    _, control, own = federate(12, is_corrected=True, cohort_size=cohort_size, payload=payload)
    mean = torch.stack(own).double().mean(0)
    assert float(torch.stack(own).norm()) > 1.0
    torch.testing.assert_close(control.vector.double(), mean, rtol=1e-5, atol=1e-5)


def test_before_the_first_round_c_is_zero() -> None:
    control = control_of(ServerState(0, AdapterState(LAYOUT, torch.ones(LAYOUT.size))))
    assert not bool(control.vector.any())


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_engine_corrects_gradients_as_its_plain_twin(
    clip_norm: float, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", "float64")
    free = make_job(engine.layout, clip_norm=clip_norm, proximal=0.5)
    generator = torch.Generator().manual_seed(5)
    job = replace(free, correction=0.05 * torch.randn(engine.layout.size, generator=generator))
    (found,) = engine.train([job])
    torch.testing.assert_close(found.delta, train_plainly(engine.base, engine.layout, job), **EXACT)
    (uncorrected,) = engine.train([free])
    assert uncorrected.gradient is None
    assert float((found.delta - uncorrected.delta).abs().max()) > 1e-4


def test_kept_gradient_is_clipped_and_without_correction(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "float64")
    job = make_job(engine.layout, steps=1)
    nothing, much = torch.zeros(engine.layout.size), torch.full((engine.layout.size,), 3.0)
    (plain,) = engine.train([replace(job, correction=nothing)])
    (corrected,) = engine.train([replace(job, correction=much)])
    assert torch.equal(plain.gradient, corrected.gradient)
    (step,) = engine.train([replace(job, correction=-plain.gradient)])
    # with its own gradient taken away nothing is left to step along
    assert float(step.delta.abs().max()) < 1e-6
    assert float(plain.gradient.norm()) > 0.05
    clipped = replace(job, correction=nothing, training=replace(job.training, clip_norm=0.05))
    (found,) = engine.train([clipped])
    torch.testing.assert_close(found.gradient, plain.gradient * (0.05 / plain.gradient.norm()), **EXACT)


def test_it_is_the_mean_over_the_steps_each_client_took(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "float64", token_budget=100_000)
    nothing = torch.zeros(engine.layout.size)
    jobs = [
        replace(make_job(engine.layout, name, seed, steps=steps, clip_norm=0.1), correction=nothing)
        for seed, (name, steps) in enumerate(zip("abc", (3, 1, 2), strict=True))
    ]
    for job, together in zip(jobs, engine.train(jobs), strict=True):
        (alone,) = engine.train([job])
        torch.testing.assert_close(together.gradient, alone.gradient, **EXACT)
        assert float(together.gradient.norm()) <= 0.1 + 1e-12
