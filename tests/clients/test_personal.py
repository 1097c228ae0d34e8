"""A personal adapter: what is trained beside the shared one, against training on a merged base model."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from clients.personal import (
    initial_personal,
    personal_jobs,
    train_personal,
    wide_layout,
    with_personal,
)
from fedllm.adapters.layout import AdapterLayout, at_rank
from fedllm.adapters.side_by_side import side_by_side
from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job
from fedllm.engine.plain import train_plainly
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import Encoded
from fedllm.plan.training import PersonalTraining

EXACT = {"rtol": 0, "atol": 1e-12}
DUAL = PersonalTraining(rank=3, steps=4, pull=0.0)
DITTO = replace(DUAL, pull=6.0)
TRAINING = LocalTraining(steps=4, batch_size=2, learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
ROWS = tuple(
    Encoded(tuple((17 * row + 5 * place) % 300 + 5 for place in range(8)), (-100,) * 3 + (7, 9, 11, 13, 15))
    for row in range(8)
)


@pytest.fixture
def base(load_tiny: Callable[..., BaseModel]) -> BaseModel:
    return load_tiny("llama", "float64")


@pytest.fixture
def layout(base: BaseModel) -> AdapterLayout:
    return layout_of(base.model, LoraConfig(rank=2, alpha=6.0), base.fingerprint)


@pytest.fixture
def shared(layout: AdapterLayout) -> Job:
    start = 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    batches = tuple(ROWS[2 * step : 2 * step + 2] for step in range(4))
    return Job("anna", start, batches, TRAINING, layout=layout)


def merged(base: BaseModel, layout: AdapterLayout, vector: torch.Tensor) -> BaseModel:
    """Return a base model with an adapter added to its weights."""
    model = copy.deepcopy(base.model)
    for matrix, (a, b) in zip(layout.matrices, layout.factors(vector.double()), strict=True):
        model.get_submodule(matrix.module).weight.data += layout.scale * b @ a
    return replace(base, model=model)


def random_personal(layout: AdapterLayout, numbers: PersonalTraining) -> torch.Tensor:
    size = at_rank(layout, numbers.rank).size
    return 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("numbers", [DUAL, DITTO], ids=["dual", "ditto"])
def test_personal_adapter_trains_as_on_the_merged_base(
    numbers: PersonalTraining, base: BaseModel, layout: AdapterLayout, shared: Job
) -> None:
    own_layout, start = at_rank(layout, numbers.rank), random_personal(layout, numbers)
    training = numbers.training(TRAINING)
    engine = Engine(base, layout, token_budget=512)
    job = replace(shared, training=training)
    found = train_personal(engine, layout, [job], {"anna": start}, numbers)
    # beside a merged adapter, the pull to the shared adapter is the pull to no personal one
    alone = Job("anna", start, shared.batches, training, anchor=torch.zeros_like(start))
    (expected,) = Engine(merged(base, layout, shared.start), own_layout, token_budget=512).train([alone])
    assert float(expected.delta.abs().max()) > 1e-3
    torch.testing.assert_close(found["anna"], start + expected.delta.float(), rtol=0, atol=1e-6)


def test_wide_engine_equals_merged_base_exactly_in_float64(
    base: BaseModel, layout: AdapterLayout, shared: Job
) -> None:
    start = random_personal(layout, DITTO)
    own = replace(shared, training=DITTO.training(TRAINING))
    (job,) = personal_jobs(layout, [own], {"anna": start}, DITTO)
    (result,) = Engine(base, wide_layout(layout, DITTO), token_budget=512).train([job])
    assert not bool(result.delta[~job.movable].any()), "the shared half keeps its bits, weight decay or not"
    alone = Job("anna", start, shared.batches, own.training, anchor=torch.zeros_like(start))
    (expected,) = Engine(
        merged(base, layout, shared.start), at_rank(layout, DITTO.rank), token_budget=512
    ).train([alone])
    found = side_by_side(layout, torch.zeros(layout.size).double(), expected.delta, DITTO.rank)
    torch.testing.assert_close(result.delta, found, **EXACT)


def test_merged_base_without_pull_agrees_with_plain_twin(
    base: BaseModel, layout: AdapterLayout, shared: Job
) -> None:
    start, training = random_personal(layout, DUAL), DUAL.training(TRAINING)
    engine = Engine(base, wide_layout(layout, DUAL), token_budget=512)
    (job,) = personal_jobs(layout, [replace(shared, training=training)], {"anna": start}, DUAL)
    (result,) = engine.train([job])
    alone = Job("anna", start, shared.batches, training)
    plain = train_plainly(merged(base, layout, shared.start), at_rank(layout, DUAL.rank), alone)
    found = side_by_side(layout, torch.zeros(layout.size).double(), plain, DUAL.rank)
    torch.testing.assert_close(result.delta, found, **EXACT)


def test_a_stronger_pull_leaves_less_of_the_personal_adapter(
    base: BaseModel, layout: AdapterLayout, shared: Job
) -> None:
    engine = Engine(base, wide_layout(layout, DUAL), token_budget=512)
    start, sizes = initial_personal(layout, DUAL, 0, "anna"), []
    for pull in (0.0, 1.0, 100.0):
        numbers = replace(DUAL, pull=pull)
        job = replace(shared, training=numbers.training(TRAINING))
        found = train_personal(engine, layout, [job], {"anna": start}, numbers)
        factors = at_rank(layout, numbers.rank).factors(found["anna"])
        sizes.append(sum(float((b @ a).square().sum()) for a, b in factors))
    assert sizes[0] > sizes[1] > sizes[2]


def test_fused_personal_adapter_is_trained_as_alone(
    base: BaseModel, layout: AdapterLayout, shared: Job
) -> None:
    engine = Engine(base, wide_layout(layout, DITTO), token_budget=100_000)
    jobs = [replace(shared, client_id=name, training=DITTO.training(TRAINING)) for name in "abc"]
    starts = {name: initial_personal(layout, DITTO, 0, name) for name in "abc"}
    together = train_personal(engine, layout, jobs, starts, DITTO)
    for job in jobs:
        alone = train_personal(engine, layout, [job], starts, DITTO)[job.client_id]
        torch.testing.assert_close(together[job.client_id], alone, rtol=0, atol=1e-7)
    assert not torch.equal(together["a"], together["b"]), "each begins with an A of its own"


def test_a_fresh_personal_adapter_changes_no_loss(
    base: BaseModel, layout: AdapterLayout, shared: Job
) -> None:
    engine = Engine(base, layout, token_budget=512)
    job = EvaluationJob("anna", shared.start, ROWS)
    wide = with_personal(job, initial_personal(layout, DUAL, 0, "anna"), layout, DUAL)
    (plain,) = engine.evaluate([job])
    (both,) = engine.evaluate([wide])
    assert both.loss == pytest.approx(plain.loss, rel=1e-12)


def test_a_personal_adapter_that_diverges_stays_as_it_was(
    base: BaseModel, layout: AdapterLayout, shared: Job, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(base, wide_layout(layout, DUAL), token_budget=512)
    start = random_personal(layout, DUAL)
    wild = replace(shared, training=replace(TRAINING, learning_rate=1e300))
    found = train_personal(engine, layout, [wild], {"anna": start}, DUAL)
    assert torch.equal(found["anna"], start)
    assert caplog.messages == ["client anna: its personal adapter diverged and stays as it was"]
