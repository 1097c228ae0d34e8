"""`fedllm distil`: a large model, with or without an adapter, teaches a smaller one.

There are three kinds of student. A smaller model with the teacher's tokenizer learns a LoRA adapter by
forward KL to the teacher's next-token probabilities. One with another tokenizer learns an adapter by ULD
(arXiv 2402.12030). `layers=N` cuts the student out of the teacher's own layers, and teaches these.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedllm.adapters.folder import load_adapter, save_adapter
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.keys import DataConfig, LoraConfig, ModelConfig
from fedllm.data.fields import Example
from fedllm.distillation.other_tokenizer import Pair, PairedTargets, pair_text
from fedllm.distillation.smaller import cut, decoder_layers, distil_layers, layer_angles, layers_to_keep
from fedllm.distillation.student import OnPolicy, StudentTraining, on_policy
from fedllm.distillation.student import distil as distil_adapter
from fedllm.distillation.targets import Targets
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import CheckpointError, ConfigError, DataError, NoDataError
from fedllm.files import complete_folder
from fedllm.models.base import BaseModel, layout_of, load_base
from fedllm.models.chat import IGNORED, Encoded, encode
from fedllm.models.files import quiet_transformers
from scripts.console import Console, shown_path
from scripts.finished_run import bare_config, find_adapter
from strategies.distillation.public_text import read_public, split_texts

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
        return StudentTraining(self.steps, self.batch_size, self.learning_rate, 0.0, self.seed)


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


def distil(teacher: str, *, student: str, text: str, out: Path, numbers: Numbers, as_json: bool) -> None:
    """Teach a student, write its folder and print held-out losses: the teacher's, and the student's own.

    Raises:
        ConfigError: the student is no model and no number of layers that can stay, or numbers do not fit.
        DataError: the text cannot be read.
        FedLLMError: a model or an adapter cannot be loaded, or training diverged.
    """
    training = numbers.training  # refuses numbers out of range before anything is loaded
    num_layers = _num_layers(student)
    if num_layers and numbers.on_policy:
        raise ConfigError(f"--on-policy corrects a student's adapter, which --student {student} has not")
    large = open_teacher(teacher, numbers.device)
    texts = read_text(text, large.base.tokenizer, numbers)
    if num_layers:
        outcome = teach_layers(large, num_layers, texts, numbers, training)
    else:
        small = open_student(student, numbers)
        is_same = small.base.tokenizer.get_vocab() == large.base.tokenizer.get_vocab()
        form = teach_same_tokenizer if is_same else teach_other_tokenizer
        outcome = form(large, small, texts, numbers, training)
    try:
        save_student(out, large, outcome, is_cut=bool(num_layers))
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror}") from None
    _tell(large, outcome, texts, out, as_json)


def _num_layers(student: str) -> int:
    """Return N of `layers=N`, 0 where the student is a model."""
    if not student.startswith(LAYERS):
        return 0
    number = student.removeprefix(LAYERS)
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--student {student}: expected layers=N with N at least 1, or a model")
    return int(number)


def open_teacher(target: str, device: str) -> Taught:
    """Return the base model that `target` names, with the adapter of the run or adapter folder that it is.

    Raises:
        FedLLMError: neither can be loaded.
    """
    folder = Path(target)
    if not ((folder / "adapter").is_dir() or (folder / "adapter_config.json").is_file()):
        return _bare(load_base(ModelConfig(name=target, device=device)), rank=1, seed=0)
    adapter_folder, config = find_adapter(folder)
    published = load_adapter(adapter_folder)
    model = (config or bare_config(published)).model
    base = load_base(replace(model, device=device))
    return Taught(Engine(base, published.state.layout), published.state)


def open_student(name: str, numbers: Numbers) -> Taught:
    """Return the model `name` with a fresh adapter of the rank that is asked for.

    Raises:
        ModelError: it cannot be loaded.
    """
    return _bare(load_base(ModelConfig(name=name, device=numbers.device)), numbers.rank, numbers.seed)


def _bare(base: BaseModel, rank: int, seed: int) -> Taught:
    """Return a base model with a fresh adapter, whose B is zero: it says what the model alone says."""
    layout = layout_of(base.model, LoraConfig(rank=rank, alpha=2.0 * rank), base.fingerprint)
    return Taught(Engine(base, layout), initial_adapter(layout, seed))


def read_text(source: str, tokenizer: Any, numbers: Numbers) -> Text:
    """Return the texts of `source`, which takes what `data.source` takes.

    Raises:
        DataError: they cannot be read, or are too few to hold one out.
    """
    try:
        texts = read_public(source, DataConfig())
        split = split_texts(texts, numbers.num_texts, numbers.seed, lambda text: tokenizer(text)["input_ids"])
    except (DataError, NoDataError) as error:
        raise type(error)(str(error).replace("distill.text", "--text")) from None
    return Text(*(tuple(one.example for one in part) for part in (split.train, split.held_out)))


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
    student = _bare(cut(large.base, kept), rank=1, seed=numbers.seed)
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


def save_student(out: Path, large: Taught, outcome: Outcome, *, is_cut: bool) -> None:
    """Write a model folder for a student that was cut, else a PEFT adapter folder, with card and manifest.

    Raises:
        OSError: it cannot be written.
    """
    student, card = outcome.student, _card(large, outcome)
    if is_cut:
        with complete_folder(out) as building, quiet_transformers():
            student.base.model.save_pretrained(building)
            student.base.tokenizer.save_pretrained(building)
            (building / "README.md").write_text(card)
        return
    save_adapter(
        out,
        student.adapter,
        base_model=student.base.files.public_name,
        revision=student.base.files.revision,
        target_modules=sorted({one.module.rpartition(".")[2] for one in student.adapter.layout.matrices}),
        card=card,
    )


def _card(large: Taught, outcome: Outcome) -> str:
    """Return the README.md of a student: who taught it, and how well it follows; no path, no text."""
    losses = "".join(f"| {name} | {loss:.4f} |\n" for name, loss in outcome.losses.items())
    return (
        f"# A student of {large.base.files.public_name}\n\n"
        f"Distilled by fedllm ({outcome.told['form']}). Held-out loss, {outcome.told['unit']}:\n\n"
        f"| model | loss |\n|---|---|\n{losses}"
    )


def _tell(large: Taught, outcome: Outcome, texts: Text, out: Path, as_json: bool) -> None:
    report = {
        "teacher": large.base.files.public_name,
        "student": outcome.student.base.files.public_name,
        **outcome.told,
        "texts": len(texts.train),
        "held_out_texts": len(texts.held_out),
        "held_out": dict(outcome.losses),
        "folder": str(out),
    }
    if as_json:
        print(json.dumps(report))
        return
    console, losses = Console(), outcome.losses
    console.line(
        f"held-out loss ({report['unit']}): teacher {losses['teacher']:.4f}, student"
        f" {losses['before']:.4f} before and {losses['after']:.4f} after, on {len(texts.held_out)} texts"
    )
    if not losses["after"] < losses["before"]:
        console.line("the student learnt nothing; give it more --steps or another --learning-rate")
    console.line(f"student: {shown_path(out)}")
