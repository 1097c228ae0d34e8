"""What the aggregate becomes when it learns from the teacher, and how well it then does."""

import math
from contextlib import suppress
from dataclasses import dataclass

from fedllm.adapters.layout import AdapterState
from fedllm.config.keys import DistillConfig
from fedllm.distillation.student import StudentTraining, distil, supervised
from fedllm.engine.engine import Engine
from fedllm.errors import NonFiniteError
from fedllm.runs.records import DistillationLosses, LossChange
from fedllm.seeds import derive_seed
from strategies.distillation.losses import Loss, error_of_gain, measure_change, measure_loss
from strategies.distillation.material import Material
from strategies.distillation.teach import Lesson


@dataclass(frozen=True, eq=False)
class Student:
    """The adapter that has learnt, the losses that judge it, and the tokens that it read."""

    adapter: AdapterState
    losses: DistillationLosses
    num_tokens: int


def student_training(numbers: DistillConfig, seed: int, round_num: int) -> StudentTraining:
    """Return how the student of a round is trained; `seed` is the run's."""
    return StudentTraining(
        steps=numbers.steps,
        batch_size=numbers.batch_size,
        learning_rate=numbers.learning_rate,
        seed=derive_seed(seed, "distillation", round_num),
    )


def measure_held_out(engine: Engine, adapter: AdapterState, material: Material) -> Loss:
    """Return the loss of an adapter on the rows that judge a student."""
    return measure_loss(engine, adapter, material.held_out, material.held_out_domains)


def train_student(
    engine: Engine,
    start: AdapterState,
    material: Material,
    lesson: Lesson,
    training: StudentTraining,
    *,
    before: Loss,
    base: float,
    with_control: bool,
) -> Student:
    """Return the student of a lesson that begins as `start`, with losses on held-out rows.

    A student that diverged is `start` with a loss that is not a number, which the gate refuses. `before` is
    the loss of `start`, `base` the base model's. The control learns from the same rows as plain text: what
    teaching must be better than.
    """

    def measured(adapter: AdapterState) -> Loss:
        return measure_held_out(engine, adapter, material)

    after = Loss(math.nan, {})
    adapter, own, error, control, num_tokens = start, None, None, None, 0
    with suppress(NonFiniteError):  # a step that diverged is refused by the gate, and costs no round
        result = distil(engine, start, lesson.targets, training)
        # What it forgets of the clients, where public text is held out and says nothing of them.
        own = measure_change(engine, start, result.adapter, material.own)
        adapter, after, num_tokens = result.adapter, measured(result.adapter), result.num_tokens
    if math.isfinite(after.mean):
        error = error_of_gain(before, after)
    if with_control:
        with suppress(NonFiniteError):
            control = measured(supervised(engine, start, material.rows, training).adapter).mean
    losses = DistillationLosses(
        base=base,
        ensemble=lesson.ensemble,
        held_out=LossChange(before.mean, after.mean),
        error=error,
        control=control,
        domains={
            # a student that diverged has a loss in no domain
            domain: LossChange(loss, after.domains.get(domain, math.nan))
            for domain, loss in before.domains.items()
        },
        own=own,
    )
    return Student(adapter, losses, num_tokens)
