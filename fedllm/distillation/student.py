"""The student: one adapter that learns to say what the teacher says, on the engine that trains clients.

A distillation is a training job whose objective is the divergence from cached targets: AdamW, clipping,
passes and the pull to the start (mu/2 ||s (B A - B0 A0)||^2 by R x R products,
`fedllm.engine.gradient_terms`)
are those of a client. The control is the same job without the targets, on the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedllm.adapters.layout import AdapterState
from fedllm.distillation.other_tokenizer import TaughtByUnlike
from fedllm.distillation.sample import sample_texts
from fedllm.distillation.targets import Targets, TaughtBy, jensen_shannon
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job, Objective
from fedllm.errors import ConfigError, NoDataError
from fedllm.messages import LocalTraining
from fedllm.models.chat import Encoded
from fedllm.seeds import derive_seed


@dataclass(frozen=True)
class StudentTraining:
    """Numbers of a student's training; `pull` is mu, the strength of the pull to where it started.

    Raises:
        ConfigError: a number is out of range.
    """

    steps: int
    batch_size: int
    learning_rate: float
    pull: float
    seed: int
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ConfigError("a student needs steps, a batch size and a learning rate above 0")
        if min(self.pull, self.weight_decay, self.clip_norm) < 0:
            raise ConfigError("a student's pull, weight decay and clip norm are at least 0")

    @property
    def local(self) -> LocalTraining:
        """The same as the engine takes it."""
        return LocalTraining(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            proximal=self.pull,
            proximal_space="product",
        )


@dataclass(frozen=True, eq=False)
class DistilResult:
    """The adapter after training, the loss of every step before it, and the tokens that were read."""

    adapter: AdapterState
    losses: tuple[float, ...]  # mean over the batch's learnt tokens, in nats: divergence, or cross-entropy
    num_tokens: int


def distil(engine: Engine, start: AdapterState, targets: Targets, training: StudentTraining) -> DistilResult:
    """Return `start` taught to say what the targets say: forward KL over their buckets, at temperature 1.

    Raises:
        NonFiniteError: training diverged.
    """
    return _train(engine, start, targets.rows, training, TaughtBy(targets))


def supervised(
    engine: Engine, start: AdapterState, rows: Sequence[Encoded], training: StudentTraining
) -> DistilResult:
    """Return `start` fine-tuned on the rows' own tokens: the control, on the same batches and tokens.

    Raises:
        NoDataError: no row has a token to learn.
        NonFiniteError: training diverged.
    """
    taught = [row for row in rows if row.num_supervised]
    if not taught:
        raise NoDataError("distillation: no row of its text has a token to learn; give it longer texts")
    return _train(engine, start, taught, training, None)


def distil_unlike(
    engine: Engine, start: AdapterState, objective: TaughtByUnlike, training: StudentTraining
) -> DistilResult:
    """Return `start` taught by a teacher with another tokenizer (`fedllm.distillation.other_tokenizer`).

    Raises:
        NonFiniteError: training diverged.
    """
    return _train(engine, start, list(objective.pairs), training, objective)


@dataclass(frozen=True)
class OnPolicy:
    """How a student is corrected on its own texts (GKD, arXiv 2306.13649).

    `rounds` times it writes `num_texts` texts of at most `max_tokens` new tokens, the teacher marks them, and
    it takes its steps on them with the divergence of `beta` (0.5: symmetric; towards 1: reverse KL). Every
    round has an optimizer of its own.
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
        objective = TaughtBy(targets, divergence)
        numbers = replace(training, seed=seed)
        # The pull is to where the stage began, whatever round it is in.
        further = _train(engine, done.adapter, targets.rows, numbers, objective, anchor=start)
        losses, num_tokens = done.losses + further.losses, done.num_tokens + further.num_tokens
        done = DistilResult(further.adapter, losses, num_tokens)
    return done


def _train(
    engine: Engine,
    start: AdapterState,
    rows: Sequence[Encoded],
    training: StudentTraining,
    objective: Objective | None,
    anchor: AdapterState | None = None,
) -> DistilResult:
    job = Job(
        "student",
        start.vector,
        student_batches(rows, training),
        training.local,
        layout=start.layout,
        anchor=None if anchor is None else anchor.vector,
        objective=objective,
    )
    (result,) = engine.train([job])
    adapter = AdapterState(start.layout, (start.vector + result.delta).to(torch.float32)).checked_finite()
    return DistilResult(adapter, result.losses, result.num_tokens)


def student_batches(rows: Sequence[Encoded], training: StudentTraining) -> tuple[tuple[Encoded, ...], ...]:
    """Return the rows of every step, drawn from the seed: every row once before any is drawn twice."""
    needed = training.steps * training.batch_size
    order: list[int] = []
    epoch = 0
    while len(order) < needed:
        generator = np.random.Generator(np.random.PCG64(derive_seed(training.seed, "student", epoch)))
        order += generator.permutation(len(rows)).tolist()
        epoch += 1
    size = training.batch_size
    return tuple(tuple(rows[n] for n in order[begin : begin + size]) for begin in range(0, needed, size))
