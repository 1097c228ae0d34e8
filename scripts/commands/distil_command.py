"""`fedllm distil`: a large model, with or without an adapter, teaches a smaller one (`scripts.students`)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.adapters.folder import load_adapter, save_adapter
from fedllm.adapters.peft_reading import check_peft_reads, names_for_peft
from fedllm.config.keys import DataConfig, ModelConfig
from fedllm.engine.engine import Engine
from fedllm.errors import CheckpointError, ConfigError, DataError, NoDataError
from fedllm.files import complete_folder
from fedllm.models.base import load_base
from fedllm.models.files import quiet_transformers
from scripts.console import Console, shown_path
from scripts.finished_run import bare_config, check_new, find_adapter
from scripts.students import (
    LAYERS,
    Numbers,
    Outcome,
    Taught,
    Text,
    fresh_adapter,
    teach_layers,
    teach_other_tokenizer,
    teach_same_tokenizer,
)
from strategies.distillation.public_text import read_public, split_texts


def distil(teacher: str, *, student: str, text: str, out: Path, numbers: Numbers, as_json: bool) -> None:
    """Teach a student, write its folder and print held-out losses: the teacher's, and the student's own.

    Raises:
        ConfigError: the student is no model and no number of layers that can stay, numbers do not fit, or the
            folder is not a new one.
        DataError: the text cannot be read.
        FedLLMError: a model or an adapter cannot be loaded, or training diverged.
    """
    training = numbers.training  # refuses numbers out of range before anything is loaded
    check_new(out, "--out")
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
        return fresh_adapter(load_base(ModelConfig(name=target, device=device)), rank=1, seed=0)
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
    return fresh_adapter(load_base(ModelConfig(name=name, device=numbers.device)), numbers.rank, numbers.seed)


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
    modules = [matrix.module for matrix in student.adapter.layout.matrices]
    save_adapter(
        out,
        student.adapter,
        base_model=student.base.files.public_name,
        revision=student.base.files.revision,
        target_modules=names_for_peft(student.base.model, modules) or modules,
        card=card,
        finish=lambda building: check_peft_reads(building, student.base.model, student.adapter),
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
