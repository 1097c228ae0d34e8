"""Three kinds of student, and how a large model teaches each.

A smaller model with the teacher's tokenizer learns a LoRA adapter by forward KL to the teacher's next-token
probabilities. One with another tokenizer learns an adapter by ULD (arXiv 2402.12030). A student that is cut
out of the teacher's own layers learns in these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.keys import LoraConfig
from fedllm.data.fields import Example
from fedllm.distillation.other_tokenizer import Pair, PairedTargets, pair_text
from fedllm.distillation.smaller import cut, decoder_layers, distil_layers, layer_angles, layers_to_keep
from fedllm.distillation.student import OnPolicy, StudentTraining, on_policy
from fedllm.distillation.student import distil as distil_adapter
from fedllm.distillation.targets import Targets
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import ConfigError, NoDataError
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import IGNORED, Encoded, encode

LAYERS = "layers="


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How much is distilled, and how."""

    steps: int = 100
    learning_rate: float = 5e-4
    batch_size: int = 8
    top_k: int = 64
    on_policy: int = 0  # rounds on the student's own texts, after the steps
    rank: int = 16
    max_tokens: int = 256
    num_texts: int = 512
    seed: int = 0
    device: str = "auto"

    @property
    def training(self) -> StudentTraining:
        """The same as the student's training takes it."""
        return StudentTraining(self.steps, self.batch_size, self.learning_rate, self.seed)


@dataclass(frozen=True, eq=False)
class Taught:
    """A base model on an engine with the adapter that is measured; for a teacher it may be the zero one."""

    engine: Engine
    adapter: AdapterState

    @property
    def base(self) -> BaseModel:
        """The base model."""
        return self.engine.base

    @property
    def teacher(self) -> Teacher:
        """The same as a teacher: an ensemble of one."""
        return Teacher((self.adapter.vector,), self.adapter.layout, torch.ones(1))


@dataclass(frozen=True, eq=False)
class Text:
    """What is distilled on, and texts of other documents that losses are measured on."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Outcome:
    """A student that was taught, held-out losses by "teacher", "before" and "after", and more to report."""

    student: Taught
    losses: Mapping[str, float]
    told: Mapping[str, Any] = field(default_factory=dict)


def fresh_adapter(base: BaseModel, rank: int, seed: int) -> Taught:
    """Return a base model with a fresh adapter, whose B is zero: it says what the model alone says."""
    layout = layout_of(base.model, LoraConfig(rank=rank, alpha=2.0 * rank), base.fingerprint)
    return Taught(Engine(base, layout), initial_adapter(layout, seed))


def _rows(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> tuple[Encoded, ...]:
    rows = (encode(example, tokenizer, max_tokens) for example in examples)
    found = tuple(row for row in rows if row is not None)
    if not found:
        raise NoDataError("--text: no text has a token to learn; name longer texts or raise --max-tokens")
    return found


def teach_same_tokenizer(
    large: Taught, small: Taught, texts: Text, numbers: Numbers, training: StudentTraining
) -> Outcome:
    """Teach an adapter on a model with the teacher's tokenizer, then correct it on texts of its own.

    Raises:
        ConfigError: the teacher knows tokens that the student's output has no place for.
    """
    rows, held_out = (
        _rows(part, large.base.tokenizer, numbers.max_tokens) for part in (texts.train, texts.held_out)
    )
    targets = teach(large.engine, large.teacher, rows, top_k=numbers.top_k)
    _check_vocabulary(targets, small.base)
    done = distil_adapter(small.engine, small.adapter, targets, training)
    if numbers.on_policy:
        stage = OnPolicy(numbers.on_policy, numbers.batch_size * numbers.steps, numbers.max_tokens // 2)
        stage = replace(stage, num_texts=min(stage.num_texts, len(rows)), top_k=numbers.top_k)
        done = on_policy(
            *(small.engine, done.adapter, large.teacher, [_prompt(row) for row in rows], stage, training),
            teacher_engine=large.engine,
        )
    student = Taught(small.engine, done.adapter)
    losses = {
        "teacher": _loss(large, held_out),
        "before": _loss(small, held_out),
        "after": _loss(student, held_out),
    }
    return Outcome(student, losses, {"form": "same tokenizer", "unit": "nats per token"})


def _check_vocabulary(targets: Targets, base: BaseModel) -> None:
    size = base.model.config.get_text_config().vocab_size
    if int(targets.ids_Nk.max()) >= size:
        raise ConfigError(f"--student: its output has {size} tokens, fewer than the teacher's; lower --top-k")


def _prompt(row: Encoded) -> tuple[int, ...]:
    """Return the tokens before the answer; of a plain text, where all are learnt, the first quarter."""
    begin = next(place for place, label in enumerate(row.labels) if label != IGNORED)
    return row.tokens[: begin or max(1, len(row.tokens) // 4)]


def teach_other_tokenizer(
    large: Taught, small: Taught, texts: Text, numbers: Numbers, training: StudentTraining
) -> Outcome:
    """Teach an adapter on a model with another tokenizer.

    Losses are in nats per character: those per token of two vocabularies cannot be compared.

    Raises:
        ConfigError: on-policy rounds are asked for, which need one vocabulary.
        NoDataError: no text has tokens to learn in both vocabularies.
    """
    if numbers.on_policy:
        raise ConfigError("--on-policy needs a student with the teacher's tokenizer; leave it out")
    pairs, held_out = (_pairs(part, large, small, numbers) for part in (texts.train, texts.held_out))
    targets = teach(large.engine, large.teacher, [pair.teacher for pair in pairs], top_k=numbers.top_k)
    objective = PairedTargets({pair.student: pair for pair in pairs}, targets)
    student = Taught(small.engine, distil_adapter(small.engine, small.adapter, objective, training).adapter)
    theirs, ours = ([pair.teacher for pair in held_out], [pair.student for pair in held_out])
    losses = {
        "teacher": _loss_by_character(large, theirs),
        "before": _loss_by_character(small, ours),
        "after": _loss_by_character(student, ours),
    }
    return Outcome(student, losses, {"form": "other tokenizer", "unit": "nats per character"})


def _pairs(examples: Sequence[Example], large: Taught, small: Taught, numbers: Numbers) -> list[Pair]:
    """Return plain texts in both vocabularies; a conversation is its turns, one a line."""
    texts = (one.text or "\n".join(turn.content for turn in one.turns) for one in examples)
    tokenizers = (small.base.tokenizer, large.base.tokenizer)
    pairs = [pair_text(text, *tokenizers, numbers.max_tokens) for text in texts]
    found = [pair for pair in pairs if pair is not None]
    if not found:
        raise NoDataError("--text: no text has tokens to learn in both vocabularies; name longer texts")
    return found


def teach_layers(
    large: Taught, num_layers: int, texts: Text, numbers: Numbers, training: StudentTraining
) -> Outcome:
    """Cut a student of so many layers out of the teacher's base model, and teach these layers.

    Raises:
        ConfigError: not so many layers can go.
        ModelError: the model is no stack of decoder layers, or is quantised.
    """
    rows, held_out = (
        _rows(part, large.base.tokenizer, numbers.max_tokens) for part in (texts.train, texts.held_out)
    )
    number = len(decoder_layers(large.base.model))
    if num_layers >= number:
        raise ConfigError(f"--student {LAYERS}{num_layers}: the teacher has {number}; name fewer")
    angles = layer_angles(large.base, rows[: numbers.batch_size])
    kept = layers_to_keep(angles, number - num_layers)
    student = fresh_adapter(cut(large.base, kept), rank=1, seed=numbers.seed)
    losses = {"teacher": _loss(large, held_out), "before": _loss(student, held_out)}
    distil_layers(student.base, teach(large.engine, large.teacher, rows, top_k=numbers.top_k), training)
    losses["after"] = _loss(student, held_out)
    told = {"form": "cut from the teacher", "layers": list(kept), "unit": "nats per token"}
    return Outcome(student, losses, told)


def _loss(model: Taught, rows: Sequence[Encoded]) -> float:
    """Return the mean loss of a model on rows, in nats per learnt token."""
    (answer,) = model.engine.evaluate([EvaluationJob("held out", model.adapter.vector, tuple(rows))])
    return answer.loss


def _loss_by_character(model: Taught, rows: Sequence[Encoded]) -> float:
    total = _loss(model, rows) * sum(row.num_supervised for row in rows)
    texts = model.base.tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=True)
    return total / max(1, sum(map(len, texts)))
