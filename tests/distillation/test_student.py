"""The student: its gradient, its plain twin, its control, and that it learns what the teacher says."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fedllm.adapters.layout import AdapterState
from fedllm.distillation.plain import distil_plainly, teach_plainly
from fedllm.distillation.student import (
    OnPolicy,
    StudentTraining,
    distil,
    on_policy,
    student_batches,
    supervised,
)
from fedllm.distillation.targets import RESOLUTION, BucketDivergence, forward_kl, jensen_shannon
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.errors import ConfigError, NoDataError, NonFiniteError
from fedllm.models.chat import IGNORED, Encoded

LENGTHS = [12, 3, 30, 7, 2, 19]
WHOLE = 10**6
TRAINING = StudentTraining(steps=4, batch_size=3, learning_rate=1e-2, seed=0)
KL = {
    "kl": forward_kl,
    "jsd": jensen_shannon(0.5),
    "reverse": jensen_shannon(1.0),
    "low": jensen_shannon(0.1),
}


def start_of(engine: Engine, seed: int = 7) -> AdapterState:
    vector = 0.3 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(seed))
    return AdapterState(engine.layout, vector)


def mean_vector(teacher: Teacher) -> torch.Tensor:
    return torch.stack(teacher.adapters).mean(dim=0)


@pytest.mark.parametrize("top_k", [1, 5, 49, 50])
@pytest.mark.parametrize("name", sorted(KL))
def test_bucket_losses_and_gradients_are_those_of_autograd(name: str, top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits, other = (torch.randn(6, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    probs = other.softmax(dim=1)
    ids = probs.topk(top_k, dim=1).indices
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, ids, True)

    def bucketed(probabilities: torch.Tensor) -> torch.Tensor:
        parts = [probabilities.gather(1, ids)]
        if top_k < 50:
            parts.append((probabilities * ~kept).sum(dim=1, keepdim=True))
        return torch.cat(parts, dim=1)

    mine = logits.clone().requires_grad_()
    expected = KL[name](bucketed(probs).log(), bucketed(mine.softmax(dim=1)).log())
    expected.sum().backward()
    tail = (probs * ~kept).sum(dim=1, keepdim=True).clamp(min=1e-300)
    stored = torch.cat([probs.gather(1, ids), tail], dim=1).log()
    losses, gradient = BucketDivergence(ids, stored, KL[name])(slice(0, 6), logits.clone(), True)
    torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, mine.grad, rtol=0, atol=1e-12)
    assert not losses.requires_grad
    assert BucketDivergence(ids, stored, KL[name])(slice(0, 6), logits.clone(), False)[1] is None


def test_a_divergence_grows_with_its_buckets_to_the_whole_one() -> None:
    theirs, mine = (torch.randn(9, 40, dtype=torch.float64) for _ in range(2))
    losses = []
    for top_k in (1, 4, 16, 40):
        kept, ids = theirs.softmax(dim=1).topk(top_k, dim=1)
        tail = (1 - kept.sum(dim=1, keepdim=True)).clamp(min=1e-300)
        criterion = BucketDivergence(ids, torch.cat([kept, tail], dim=1).log(), forward_kl)
        losses.append(criterion(slice(0, 9), mine.clone(), False)[0])
    whole = (theirs.softmax(dim=1) * (theirs.log_softmax(dim=1) - mine.log_softmax(dim=1))).sum(dim=1)
    torch.testing.assert_close(losses[-1], whole, rtol=0, atol=1e-12)
    for fewer, more in pairwise(losses):
        assert bool((fewer <= more + 1e-12).all())
        assert bool((fewer >= 0).all())


@pytest.mark.parametrize("name", sorted(KL))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_students_gradient_equals_finite_differences(
    name: str, make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine("gpt2"), make_rows(LENGTHS, context=0.3)  # llama's norms are in float32
    targets = teach(engine, make_teacher(engine), rows, top_k=6, dtype=torch.float64)
    start = start_of(engine).vector.double()
    objective, training = replace(targets, divergence=KL[name]), replace(TRAINING, steps=1, clip_norm=0.0)
    job = Job("student", start, (rows,), training.local, objective=objective)

    def step_at(vector: torch.Tensor) -> tuple[torch.Tensor, float]:
        # With a correction, here of zeros, the gradient is reported.
        (result,) = engine.train([replace(job, start=vector, correction=torch.zeros_like(vector))])
        assert result.gradient is not None
        return result.gradient, result.loss

    gradient, loss = step_at(start)
    assert loss > 0.01
    assert float(gradient.abs().max()) > 1e-3
    width = 1e-5
    for place in torch.randperm(len(start), generator=torch.Generator().manual_seed(1))[:25].tolist():
        moved = torch.zeros_like(start)
        moved[place] = width
        slope = (step_at(start + moved)[1] - step_at(start - moved)[1]) / (2 * width)
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "numbers",
    [{}, {"clip_norm": 0.01}, {"weight_decay": 0.2, "batch_size": 5, "clip_norm": 0.0}],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_with_all_tokens_kept_the_student_is_its_plain_twin(
    kind: str, numbers: dict[str, Any], make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine(kind), make_rows(LENGTHS, context=0.3)
    teacher, start = make_teacher(engine), start_of(engine)
    training = replace(TRAINING, **numbers)
    targets = teach(engine, teacher, rows, top_k=WHOLE, dtype=torch.float64)
    whole = [log_probs for log_probs, _ in teach_plainly(engine.base, teacher, rows)]
    plain = distil_plainly(engine.base, start, rows, whole, training)
    assert float(plain.abs().max()) > 5e-3
    moved = distil(engine, start, targets, training).adapter.vector - start.vector
    # The adapter itself is float32; what was computed is float64.
    torch.testing.assert_close(moved.double(), plain, rtol=0, atol=2e-7)


@pytest.mark.parametrize("top_k", [1, 6, 64, WHOLE])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_student_equal_to_its_teachers_keeps_every_bit(
    kind: str, top_k: int, make_engine: Callable, make_rows: Callable
) -> None:
    """Targets are in 16 bits, so what is left of the divergence is rounding."""
    engine, rows = make_engine(kind, "float32"), make_rows(LENGTHS)
    start = start_of(engine)
    teacher = Teacher((start.vector,) * 3, engine.layout, torch.ones(3))
    targets = teach(engine, teacher, rows, top_k=top_k)
    result = distil(engine, start, targets, TRAINING)
    assert max(result.losses) < RESOLUTION / 5
    assert torch.equal(result.adapter.vector, start.vector)


def test_it_learns_what_the_teacher_says(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine("llama", "float32"), make_rows([20] * 6)
    teacher = make_teacher(engine, 2)
    start = AdapterState(engine.layout, mean_vector(teacher))
    targets = teach(engine, teacher, rows, top_k=32)
    training = replace(TRAINING, steps=40, batch_size=6)
    result = distil(engine, start, targets, training)
    assert len(result.losses) == 40
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.num_tokens == 40 * 6 * 20


def test_the_order_of_a_batch_does_not_matter(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine(), make_rows(LENGTHS, context=0.3)
    teacher, start = make_teacher(engine), start_of(engine)
    training = replace(TRAINING, steps=2, batch_size=len(rows))
    found = [
        distil(engine, start, teach(engine, teacher, order, top_k=6, dtype=torch.float64), training)
        for order in (rows, rows[::-1])
    ]
    torch.testing.assert_close(found[0].adapter.vector, found[1].adapter.vector, rtol=0, atol=1e-6)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-9)


def test_splitting_a_step_into_passes_changes_nothing(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rows = make_engine(), make_rows(LENGTHS)
    targets, start = teach(engine, make_teacher(engine), rows, top_k=6, dtype=torch.float64), start_of(engine)
    whole = distil(engine, start, targets, TRAINING)
    monkeypatch.setattr(engine, "token_budget", 1)
    monkeypatch.setattr("fedllm.engine.token_budget.CPU_STEP_TOKENS", 1)
    split = distil(engine, start, targets, TRAINING)
    assert whole.losses == pytest.approx(split.losses, rel=1e-11)
    torch.testing.assert_close(whole.adapter.vector, split.adapter.vector, rtol=0, atol=1e-6)


def test_the_control_is_plain_fine_tuning_on_the_same_batches(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine("llama", "float32"), make_rows(LENGTHS, context=0.3)
    start = start_of(engine)
    control = supervised(engine, start, rows, TRAINING)
    job = Job("a", start.vector, student_batches(rows, TRAINING), TRAINING.local)
    (result,) = engine.train([job])
    assert torch.equal(control.adapter.vector, start.vector + result.delta)
    assert control.losses == result.losses
    assert sum(control.losses) / len(control.losses) == pytest.approx(result.loss)
    taught = distil(engine, start, teach(engine, make_teacher(engine), rows, top_k=6), TRAINING)
    assert control.num_tokens == taught.num_tokens


def test_a_job_with_targets_and_one_without_are_trained_apart(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine("llama", "float32"), make_rows(LENGTHS)
    targets, start = teach(engine, make_teacher(engine), rows, top_k=6), start_of(engine)
    batches = student_batches(rows, TRAINING)
    plain = Job("plain", start.vector, batches, TRAINING.local)
    taught = replace(plain, client_id="taught", objective=targets)
    alone = [next(engine.train([job])).delta for job in (plain, taught)]
    together = [result.delta for result in engine.train([plain, taught])]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert not torch.equal(*alone)


def test_every_row_is_drawn_before_any_twice_by_the_seed(make_rows: Callable) -> None:
    rows = make_rows(list(range(2, 9)))
    training = replace(TRAINING, steps=5, batch_size=3)
    batches = student_batches(rows, training)
    drawn = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [3] * 5
    assert set(drawn[:7]) == set(drawn[7:14]) == set(rows)
    assert batches == student_batches(rows, training)
    assert batches != student_batches(rows, replace(training, seed=1))


def test_on_its_own_texts_the_teacher_brings_it_nearer(make_engine: Callable, make_teacher: Callable) -> None:
    engine = make_engine("llama", "float32")
    teacher = make_teacher(engine, 2)
    start = AdapterState(engine.layout, mean_vector(teacher))
    stage = OnPolicy(rounds=3, num_texts=8, max_tokens=10, beta=0.5, top_k=32)
    training = replace(TRAINING, steps=10, batch_size=8)
    result = on_policy(engine, start, teacher, [(7,), (9, 11)], stage, training)
    assert len(result.losses) == 30
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])
    again = on_policy(engine, start, teacher, [(7,), (9, 11)], stage, training)
    assert torch.equal(result.adapter.vector, again.adapter.vector)


def test_what_cannot_be_trained_is_refused(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine = make_engine("llama", "float32")
    for change in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"clip_norm": -1.0}):
        with pytest.raises(ConfigError):
            replace(TRAINING, **change)
    with pytest.raises(ConfigError, match="beta"):
        jensen_shannon(1.5)
    with pytest.raises(NoDataError):
        supervised(engine, start_of(engine), [Encoded((5, 6), (IGNORED, IGNORED))], TRAINING)
    targets = teach(engine, make_teacher(engine), make_rows(LENGTHS), top_k=6)
    with pytest.raises(NonFiniteError):
        distil(engine, start_of(engine), targets, replace(TRAINING, learning_rate=1e30))
