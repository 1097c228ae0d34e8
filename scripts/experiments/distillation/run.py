"""The trial of the distillation experiment: one federation, and every way to teach its last round back.

All but the last round are the product's own. The last is done step by step, so that its clients' adapters are
at hand; then every variant starts from the same aggregate and the same adapters.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import torch

from clients.data_holder import DataHolder
from fedllm.adapters.layout import AdapterState
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.distillation.student import distil, supervised
from fedllm.distillation.targets import Targets
from fedllm.distillation.teacher import teach
from fedllm.errors import FedLLMError, NonFiniteError
from scripts.experiments.controls import evaluate, holder_of
from scripts.experiments.distillation.last_round import Round, last_round
from scripts.experiments.distillation.material import material_of
from scripts.studies.trials import Figures, Setting, Trial
from strategies.distillation.learn import student_training
from strategies.distillation.losses import Loss, error_of_gain, measure_base, measure_change, measure_loss
from strategies.distillation.material import Material

TEACHERS = ("posterior", "uniform", "logit-mean")
TUNED = "tuned on the text"  # the control: the same rows as plain text


def distilled(trial: Trial, setting: Setting) -> Figures:
    """Return every variant's held-out losses on the clients' rows, and what the gate said of it.

    The options name the texts ("text:NAME" -> `distill.text`), the students' learning rates ("rates",
    separated by commas) and the teachers ("teachers", likewise; all where there are none). Each variant
    takes the rate with the least loss on the texts its gate looks at. A text that cannot be used is left
    out, with the reason under "lost".
    """
    config = setting.config(trial)
    last = last_round(config)
    holder = holder_of(config)
    nothing = AdapterState(last.engine.layout, torch.zeros(last.engine.layout.size))
    figures: Figures = {
        "base": asdict(_on_clients(holder, nothing)),
        "aggregate": asdict(_on_clients(holder, last.aggregate)),
        "ensembles": {kind: asdict(_ensemble(last, holder, kind)) for kind in teachers_of(trial.options)},
    }
    return {**figures, **on_texts(last, holder, config, trial.options)}


@dataclass(frozen=True)
class Losses:
    """Held-out losses of the clients, in nats per token."""

    mean: float
    worst: float
    clients: Mapping[str, float]


def teachers_of(options: Mapping[str, Scalar]) -> tuple[str, ...]:
    """Return the kinds of teachers that the options of a trial name, all where they name none."""
    return tuple(str(options["teachers"]).split(",")) if "teachers" in options else TEACHERS


def _losses(clients: Mapping[str, float]) -> Losses:
    return Losses(sum(clients.values()) / len(clients), max(clients.values()), dict(clients))


def _on_clients(holder: DataHolder, adapter: AdapterState) -> Losses:
    """Return the losses of an adapter on what every client holds out."""
    return _losses(evaluate(holder, dict.fromkeys(holder.clients, adapter.vector)))


def _ensemble(last: Round, holder: DataHolder, kind: str) -> Losses:
    """Return the losses of the ensemble itself."""
    held_out = {name: client.held_out for name, client in holder.clients.items() if client.held_out}
    teacher = last.teacher(kind)
    return _losses({name: teach(last.engine, teacher, rows, top_k=1).loss for name, rows in held_out.items()})


def on_texts(last: Round, holder: DataHolder, config: RunConfig, options: Mapping[str, Scalar]) -> Figures:
    """Return the variants of every text that the options name, and of those that failed the reason."""
    rates = [float(rate) for rate in str(options["rates"]).split(",")]
    texts: Figures = {}
    lost: dict[str, str] = {}
    for option, text in options.items():
        kind, _, name = option.partition(":")
        if kind != "text":
            continue
        try:
            changed = config.override({"distill.text": text})
            texts[name] = variants_of(last, holder, changed, rates, teachers_of(options))
        except FedLLMError as error:
            lost[name] = str(error)
    return {"texts": texts, "lost": lost}


def variants_of(
    last: Round, holder: DataHolder, config: RunConfig, rates: Sequence[float], teachers: Sequence[str]
) -> Figures:
    """Return what every teacher, and the control, makes of the aggregate with one choice of text."""
    material = material_of(last, config)

    def at_gate(adapter: AdapterState) -> Loss:
        return measure_loss(last.engine, adapter, material.held_out, material.held_out_domains)

    before = at_gate(last.aggregate)
    found: Figures = {
        "rows": len(material.rows),
        "tokens": sum(row.num_supervised for row in material.rows),
        "removed": material.texts.num_removed,
        "written": material.texts.num_written,
        "refused": material.texts.num_refused,
        "held_out": len(material.held_out),
        "held_out_text": material.texts.held_out_kind,
        "gate_base": measure_base(last.engine, material.held_out),
        "gate_before": before.mean,
    }
    for name in (*teachers, TUNED):
        gate_ensemble, targets = None, None
        if name != TUNED:
            teacher, top_k = last.teacher(name), config.distill.top_k
            gate_ensemble = teach(last.engine, teacher, material.held_out, top_k=1).loss
            targets = teach(last.engine, teacher, material.rows, top_k=top_k, hindsight=True)
        tried = [(rate, _student(last, config, material, targets, rate)) for rate in rates]
        losses = [at_gate(adapter) for _, adapter in tried]
        place = min(range(len(rates)), key=lambda place: losses[place].mean)
        (rate, adapter), after = tried[place], losses[place]
        own = measure_change(last.engine, last.aggregate, adapter, material.own)
        found[name] = {
            **asdict(_on_clients(holder, adapter)),
            "rate": rate,
            "gate_ensemble": gate_ensemble,
            "gate_after": after.mean,
            "gate_error": error_of_gain(before, after),
            "own": (own.before, own.after) if own else None,
        }
    return found


def _student(
    last: Round, config: RunConfig, material: Material, targets: Targets | None, rate: float
) -> AdapterState:
    """Return a student, the start where it diverged; without targets it is tuned on the rows' own tokens."""
    training = replace(
        student_training(config.distill, config.seed, config.federation.num_rounds), learning_rate=rate
    )
    with suppress(NonFiniteError):
        if targets is None:
            return supervised(last.engine, last.aggregate, material.rows, training).adapter
        return distil(last.engine, last.aggregate, targets, training).adapter
    return last.aggregate
