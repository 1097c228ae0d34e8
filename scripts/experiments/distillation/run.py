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
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import FedLLMError, NonFiniteError
from fedllm.messages import ClientUpdate
from fedllm.plan.run_plan import distillation_of, resolve
from scripts.experiments.controls import holder_of
from scripts.experiments.trials import Figures, Setting, Trial
from scripts.runtimes.local import init, step
from strategies.cohort.plan_round import plan_round
from strategies.distillation.learn import student_training
from strategies.distillation.losses import Loss, error_of_gain, measure_base, measure_change, measure_loss
from strategies.distillation.material import Material, make_material
from strategies.distillation.originality import text_screen
from strategies.distillation.public_text import open_public_text
from strategies.distillation.step import open_engine
from strategies.distillation.synthetic_text import writers_of
from strategies.distillation.teachers import ClientAdapter, Teachers, priors_of
from strategies.exchange.receiving import receive, sort_answers
from strategies.exchange.requesting import train_requests
from strategies.rounds import aggregate
from strategies.session import Session

TEACHERS = ("posterior", "uniform", "logit-mean")
TUNED = "tuned on the text"  # the control: the same rows as plain text


@dataclass(frozen=True, eq=False)
class Round:
    """A federation's last round: the aggregate and the adapters it was made of."""

    session: Session
    engine: Engine
    aggregate: AdapterState
    clients: tuple[ClientAdapter, ...]

    def teacher(self, kind: str) -> Teacher:
        """Return the ensemble of the round's clients."""
        vectors = tuple(client.vector for client in self.clients)
        return Teacher(vectors, self.engine.layout, priors_of(self.clients), kind)


def distilled(trial: Trial, setting: Setting) -> Figures:
    """Return every variant's held-out losses on the clients' rows, and what the gate said of it.

    The options name the texts ("text:NAME" -> `distill.text`) and the students' learning rates ("rates",
    separated by commas): each variant takes the rate with the least loss on the texts its gate looks at.
    A text that cannot be used is left out, with the reason under "lost".
    """
    config = setting.config(trial)
    last = last_round(config)
    holder = holder_of(config)
    nothing = AdapterState(last.engine.layout, torch.zeros(last.engine.layout.size))
    figures: Figures = {
        "base": asdict(_on_clients(holder, nothing)),
        "aggregate": asdict(_on_clients(holder, last.aggregate)),
        "ensembles": {kind: asdict(_ensemble(last, holder, kind)) for kind in TEACHERS},
    }
    return {**figures, **on_texts(last, holder, config, trial.options)}


def last_round(config: RunConfig) -> Round:
    """Return a federation's last round, with the adapters of its clients."""
    state = init(config)
    for _ in range(config.federation.num_rounds - 1):
        state, _ = step(state)
    session, before = state.session, state.server
    plan = plan_round(session, before, 1)
    arriving = receive(session, plan, train_requests(session, before, plan))
    answers = list(sort_answers(arriving, plan.asked))
    teachers = Teachers(before.adapter, plan.round_num, config.distill.max_teachers)
    for answer in answers:
        if isinstance(answer, ClientUpdate):
            teachers.add(answer)
    after, record = aggregate(session, before, plan, answers)
    clients = teachers.without(record.aggregation.silenced)
    return Round(session, open_engine(session), after.adapter, clients)


@dataclass(frozen=True)
class Losses:
    """Held-out losses of the clients, in nats per token."""

    mean: float
    worst: float
    clients: Mapping[str, float]


def _losses(clients: Mapping[str, float]) -> Losses:
    return Losses(sum(clients.values()) / len(clients), max(clients.values()), dict(clients))


def _on_clients(holder: DataHolder, adapter: AdapterState) -> Losses:
    """Return the losses of an adapter on what every client holds out."""
    jobs = [
        EvaluationJob(name, adapter.vector, client.held_out)
        for name, client in holder.clients.items()
        if client.held_out
    ]
    return _losses({answer.client_id: answer.loss for answer in holder.engine.evaluate(jobs)})


def _ensemble(last: Round, holder: DataHolder, kind: str) -> Losses:
    """Return the losses of the ensemble itself: what a perfect student would reach."""
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
            texts[name] = variants_of(last, holder, config.override({"distill.text": text}), rates)
        except FedLLMError as error:
            lost[name] = str(error)
    return {"texts": texts, "lost": lost}


def variants_of(last: Round, holder: DataHolder, config: RunConfig, rates: Sequence[float]) -> Figures:
    """Return what every teacher, and the control, makes of the aggregate with one choice of text."""
    plan, round_num = resolve(config), config.federation.num_rounds
    public = open_public_text(plan.distillation, config.data)
    screen = text_screen(last.session, last.engine, last.clients, round_num)
    writers = writers_of(plan, last.engine, last.clients, round_num)
    material = make_material(distillation_of(plan), public, writers, screen)

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
    for name in (*TEACHERS, TUNED):
        gate_ensemble, targets = None, None
        if name != TUNED:
            teacher, top_k = last.teacher(name), config.distill.top_k
            gate_ensemble = teach(last.engine, teacher, material.held_out, top_k=1).loss
            targets = teach(last.engine, teacher, material.rows, top_k=top_k)
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
