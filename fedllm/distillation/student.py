"""The student: one adapter trained to predict what the teacher predicts, on the engine that trains clients.

A distillation is a training job with another objective than the next token: AdamW, clipping and
passes are those of a client.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedllm.adapters.layout import AdapterState
from fedllm.distillation.other_tokenizer import PairedTargets
from fedllm.distillation.sample import sample_texts
from fedllm.distillation.targets import Targets, jensen_shannon
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job, Objective
from fedllm.errors import ConfigError, NoDataError
from fedllm.messages import LocalTraining
from fedllm.models.chat import Encoded
from fedllm.seeds import derive_seed


@dataclass(frozen=True)
class StudentTraining:
    """Numbers of a student's training.

    Raises:
        ConfigError: a number is out of range.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ConfigError("a student needs steps, a batch size and a learning rate above 0")
        if min(self.weight_decay, self.clip_norm) < 0:
            raise ConfigError("a student's weight decay and clip norm are at least 0")

    @property
    def local(self) -> LocalTraining:
        """The same numbers as the engine takes them."""
        return LocalTraining(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )


@dataclass(frozen=True, eq=False)
class DistilResult:
    """A student after training."""

    adapter: AdapterState
    losses: tuple[float, ...]  # of each step before it: mean over the batch's learnt tokens, in nats
    num_tokens: int  # tokens that were read


def distil(
    engine: Engine, start: AdapterState, targets: Targets | PairedTargets, training: StudentTraining
) -> DistilResult:
    """Return `start` taught to predict what the teacher of `targets` does, at temperature 1.

    Raises:
        NonFiniteError: training diverged.
    """
    return _train(engine, start, targets.rows, training, targets.on(engine.base.device))


def supervised(
    engine: Engine, start: AdapterState, rows: Sequence[Encoded], training: StudentTraining
) -> DistilResult:
    """Return `start` fine-tuned on the rows' own tokens: the control, which has the batches of `distil`.

    Raises:
        NoDataError: no row has a token to learn.
        NonFiniteError: training diverged.
    """
    taught = [row for row in rows if row.num_supervised]
    if not taught:
        raise NoDataError("distillation: no row of its text has a token to learn; give it longer texts")
    return _train(engine, start, taught, training, None)


@dataclass(frozen=True)
class OnPolicy:
    """How a student is corrected on its own texts (GKD, arXiv 2306.13649).

    In each of `rounds` it writes `num_texts` texts of at most `max_tokens` new tokens, the teacher predicts
    them, and it takes its steps with the divergence of `beta`: 0.5 is symmetric, towards 1 is reverse KL.
    """

    rounds: int
    num_texts: int
    max_tokens: int
    beta: float = 0.5
    top_k: int = 64


def on_policy(
    engine: Engine,
    start: AdapterState,
    teacher: Teacher,
    prompts: Sequence[Sequence[int]],
    stage: OnPolicy,
    training: StudentTraining,
    *,
    teacher_engine: Engine | None = None,
) -> DistilResult:
    """Return `start` corrected by the teacher on texts that it writes itself, after `prompts` of tokens.

    A teacher on another base model has an engine of its own, `teacher_engine`.

    Raises:
        NoDataError: there is no prompt.
        NonFiniteError: training diverged.
    """
    divergence = jensen_shannon(stage.beta)
    done = DistilResult(start, (), 0)
    for number in range(stage.rounds):
        seed = derive_seed(training.seed, "on-policy", number)
        samples = sample_texts(
            engine,
            [done.adapter.vector],
            torch.ones(1),
            prompts,
            number=stage.num_texts,
            max_tokens=stage.max_tokens,
            seed=seed,
            layout=start.layout,
        )
        targets = teach(teacher_engine or engine, teacher, samples.rows, top_k=stage.top_k)
        targets = replace(targets, divergence=divergence).on(engine.base.device)
        numbers = replace(training, seed=seed)
        further = _train(engine, done.adapter, targets.rows, numbers, targets)
        losses, num_tokens = done.losses + further.losses, done.num_tokens + further.num_tokens
        done = DistilResult(further.adapter, losses, num_tokens)
    return done


def _train(
    engine: Engine,
    start: AdapterState,
    rows: Sequence[Encoded],
    training: StudentTraining,
    objective: Objective | None,
) -> DistilResult:
    batches = student_batches(rows, training)
    job = Job(
        "student",
        start.vector,
        batches,
        training.local,
        layout=start.layout,
        objective=objective,
    )
    (result,) = engine.train([job])
    adapter = AdapterState(start.layout, (start.vector + result.delta).to(torch.float32)).checked_finite()
    return DistilResult(adapter, result.losses, result.num_tokens)


def student_batches(rows: Sequence[Encoded], training: StudentTraining) -> tuple[tuple[Encoded, ...], ...]:
    """Return the rows of every step, drawn from the seed: every row once before any is drawn twice."""
    size, needed = training.batch_size, training.steps * training.batch_size
    order: list[int] = []
    for epoch in range(-(-needed // len(rows))):
        generator = np.random.Generator(np.random.PCG64(derive_seed(training.seed, "student", epoch)))
        order += generator.permutation(len(rows)).tolist()
    return tuple(tuple(rows[n] for n in order[begin : begin + size]) for begin in range(0, needed, size))
