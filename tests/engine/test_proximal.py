"""FedProx: the closed form of the pull is autograd's, and only the product form forgets the gauge."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.adapters.layout import AdapterLayout, LoraMatrix, at_rank
from fedllm.adapters.parts import part_of
from fedllm.engine.adapter_bank import Bank
from fedllm.engine.gradient_terms import proximal_pull
from fedllm.engine.kernels import LoopKernel
from fedllm.engine.plain import train_plainly
from fedllm.errors import LayoutError
from fedllm.messages import LocalTraining

EXACT = {"rtol": 0, "atol": 1e-12}
LAYOUT = AdapterLayout((LoraMatrix("a", 7, 5), LoraMatrix("b.c", 4, 9)), 3, 4.5, "f" * 64)
NUMBERS = {"steps": 1, "batch_size": 1, "learning_rate": 0.1, "weight_decay": 0.0, "clip_norm": 0.0}


def training(proximal: float, space: str = "factor") -> LocalTraining:
    return LocalTraining(**NUMBERS, proximal=proximal, proximal_space=space)


def random_rows(number: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, LAYOUT.size, generator=generator, dtype=torch.float64)


def bank_of(theta: torch.Tensor, trained: str = "both") -> Bank:
    bank = Bank(LAYOUT, LoopKernel(), torch.device("cpu"), torch.float64)
    bank.load(LAYOUT, list(theta), [LAYOUT.scale] * len(theta), trained)
    return bank


def gradient(
    theta: torch.Tensor, anchor: torch.Tensor, trainings: list[LocalTraining], trained: str = "both"
) -> torch.Tensor:
    bank = bank_of(theta, trained)
    pull = proximal_pull(bank, list(anchor), trainings)
    grad = torch.zeros_like(bank.theta_CP)
    assert pull is not None
    pull.add_gradient(bank, grad)
    return grad


def penalty(theta: torch.Tensor, anchor: torch.Tensor, strength: float, space: str) -> torch.Tensor:
    if space == "factor":
        return strength / 2 * (theta - anchor).square().sum()
    pairs = zip(LAYOUT.factors(theta), LAYOUT.factors(anchor), strict=True)
    return sum(strength / 2 * (LAYOUT.scale * (b @ a - b0 @ a0)).square().sum() for (a, b), (a0, b0) in pairs)


def turned(vector: torch.Tensor, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return other factors (G^-1 A, B G) of the same products, and the matrices G."""
    generator = torch.Generator().manual_seed(seed)
    gauges = [torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in LAYOUT.matrices]
    parts = []
    for (a, b), gauge in zip(LAYOUT.factors(vector), gauges, strict=True):
        parts += [(torch.linalg.inv(gauge) @ a).reshape(-1), (b @ gauge).reshape(-1)]
    return torch.cat(parts), gauges


@pytest.mark.parametrize("space", ["factor", "product"])
def test_the_gradient_of_the_pull_is_autograds(space: str) -> None:
    theta, anchor = random_rows(2, 0), random_rows(2, 1)
    strengths = [0.3, 2.0]
    found = gradient(theta, anchor, [training(strength, space) for strength in strengths])
    for row, strength in enumerate(strengths):
        variable = theta[row].clone().requires_grad_()
        (expected,) = torch.autograd.grad(penalty(variable, anchor[row], strength, space), variable)
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)


def test_each_row_is_pulled_in_its_own_space_and_strength() -> None:
    theta, anchor = random_rows(3, 0), random_rows(3, 1)
    mixed = gradient(theta, anchor, [training(0.3), training(0.0), training(0.5, "product")])
    torch.testing.assert_close(mixed[0], 0.3 * (theta[0] - anchor[0]), **EXACT)
    assert not bool(mixed[1].any())
    alone = gradient(theta[2:], anchor[2:], [training(0.5, "product")])
    torch.testing.assert_close(mixed[2:], alone, **EXACT)


def test_product_form_does_not_see_the_anchors_factors() -> None:
    theta, anchor = random_rows(1, 0), random_rows(1, 1)
    other = turned(anchor[0], 2)[0][None]
    for space, is_equal in (("product", True), ("factor", False)):
        found = [gradient(theta, start, [training(1.0, space)]) for start in (anchor, other)]
        assert torch.allclose(*found, rtol=1e-9, atol=1e-9) == is_equal


def test_product_form_pulls_other_factors_of_a_product_alike() -> None:
    theta, anchor = random_rows(1, 0), random_rows(1, 1)
    other, gauges = turned(theta[0], 2)
    here = LAYOUT.factors(gradient(theta, anchor, [training(1.0, "product")])[0])
    there = LAYOUT.factors(gradient(other[None], anchor, [training(1.0, "product")])[0])
    for (da, db), (da_turned, db_turned), gauge in zip(here, there, gauges, strict=True):
        torch.testing.assert_close(da_turned, gauge.T @ da, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(db_turned, db @ torch.linalg.inv(gauge).T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trained", ["a", "b"])
@pytest.mark.parametrize("space", ["factor", "product"])
def test_factor_trained_alone_is_pulled_as_if_both_were(space: str, trained: str) -> None:
    theta, anchor = random_rows(2, 0), random_rows(2, 1)
    trainings = [training(0.3, space), training(2.0, space)]
    whole = gradient(theta, anchor, trainings)
    part = gradient(theta, anchor, trainings, trained)
    for row in range(2):
        torch.testing.assert_close(part[row], part_of(LAYOUT, whole[row], trained), **EXACT)


@pytest.mark.parametrize("space", ["factor", "product"])
def test_at_the_anchor_and_without_strength_there_is_no_pull(space: str) -> None:
    theta = random_rows(2, 0)
    assert not bool(gradient(theta, theta, [training(1.0, space)] * 2).any())
    assert proximal_pull(bank_of(theta), list(theta), [training(0.0, space)] * 2) is None


@pytest.mark.parametrize("numbers", [{}, {"clip_norm": 0.05}, {"weight_decay": 0.2, "clip_norm": 0.5}])
@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_engine_and_its_plain_twin_pull_alike(
    kind: str, space: str, numbers: dict[str, Any], make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine(kind, "float64")
    free = make_job(engine.layout, **numbers)
    job = replace(free, training=replace(free.training, proximal=5.0, proximal_space=space))
    plain = train_plainly(engine.base, engine.layout, job)
    (found,) = engine.train([job])
    torch.testing.assert_close(found.delta, plain, **EXACT)
    (unpulled,) = engine.train([free])
    assert float((unpulled.delta - found.delta).abs().max()) > 1e-4


def test_fused_clients_are_each_pulled_as_alone(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "float64", token_budget=100_000)
    strengths = [{"proximal": 3.0}, {}, {"proximal": 4.0, "proximal_space": "product", "steps": 5}]
    jobs = [make_job(engine.layout, name, seed, **strengths[seed]) for seed, name in enumerate("abc")]
    for job, result in zip(jobs, engine.train(jobs), strict=True):
        torch.testing.assert_close(result.delta, train_plainly(engine.base, engine.layout, job), **EXACT)


@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize("trained", ["a", "b"])
def test_a_factor_that_is_trained_alone_is_pulled_at_every_rank(
    trained: str, space: str, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", "float64", token_budget=100_000)
    jobs = []
    for seed, (name, rank) in enumerate(zip("abc", (2, 1, 2), strict=True)):
        layout = at_rank(engine.layout, rank)
        job = make_job(layout, name, seed, steps=3, proximal=5.0, proximal_space=space)
        jobs.append(replace(job, layout=layout, trained=trained))
    for job, result in zip(jobs, engine.train(jobs), strict=True):
        assert job.layout is not None
        alone = train_plainly(engine.base, job.layout, job)
        torch.testing.assert_close(result.delta, alone, **EXACT)
        unpulled = replace(job, training=replace(job.training, proximal=0.0))
        assert float((train_plainly(engine.base, job.layout, unpulled) - alone).abs().max()) > 1e-5


@pytest.mark.parametrize("space", ["factor", "product"])
def test_a_strong_pull_keeps_a_client_near_its_start(
    space: str, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", "float64")
    distances = []
    for strength in (0.0, 1.0, 100.0):
        job = make_job(engine.layout, steps=30, proximal=strength, proximal_space=space)
        (result,) = engine.train([job])
        after = job.start.double() + result.delta
        pairs = zip(engine.layout.factors(after), engine.layout.factors(job.start.double()), strict=True)
        moved = [(b @ a - b0 @ a0).square().sum() for (a, b), (a0, b0) in pairs]
        distances.append(float(torch.stack(moved).sum()))
    assert distances[0] > distances[1] > distances[2]


def test_an_unknown_space_is_refused() -> None:
    with pytest.raises(LayoutError, match="one of factor, product"):
        training(1.0, "logits")
