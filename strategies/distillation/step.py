"""The distillation step: a round's clients teach the adapter that was made of them, or it stays as it is.

The teacher is the mixture of the clients' adapters, which the server holds anyway; the student is the
aggregate; the loss is the forward KL of `fedllm.distillation`. The base model is opened when a step is due
and not before. Whatever goes wrong here costs the step and never the round.
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.data.public_text import PublicText
from fedllm.distillation.student import StudentTraining, distil, supervised
from fedllm.distillation.targets import Targets
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.errors import FedLLMError, NonFiniteError, RunFailedError
from fedllm.models.files import first_line
from fedllm.models.with_base_delta import with_base_delta
from fedllm.plan.distillation import DistillationPlan
from fedllm.plan.run_plan import RunPlan, distillation_of
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import (
    DistillationLosses,
    DistillationRecord,
    DistillationTeachers,
    LossChange,
    RoundRecord,
)
from fedllm.seeds import derive_seed
from strategies.distillation.gate import Loss, ask_clients, error_of_gain, judged, loss_of, weights_by_domain
from strategies.distillation.material import PUBLIC, Material, make_material
from strategies.distillation.public_text import read_public
from strategies.distillation.report import describe_step
from strategies.distillation.synthetic_text import Gates, anything
from strategies.distillation.teachers import ClientAdapter, Teachers, priors_of
from strategies.exchange.evaluation import HeldOut
from strategies.session import Session


@dataclass(frozen=True, eq=False)
class _Taught:
    """What the teacher said: its targets for the rows and its own loss on held-out ones."""

    targets: Targets
    teacher: str
    note: str  # where another teacher than the chosen one was used, why
    ensemble: float


@dataclass(frozen=True, eq=False)
class _Learnt:
    """The student, its losses before and after its training, and that of the control if asked for.

    `own` are the losses on texts that the clients' adapters write, where those are not the held-out ones.
    """

    adapter: AdapterState
    before: Loss
    after: Loss
    num_tokens: int
    own: LossChange | None = None
    control: float | None = None


def open_public_text(plan: RunPlan) -> tuple[PublicText, ...]:
    """Return the public text that a run's steps use, none where they use none.

    Raises:
        DataError: it cannot be read or is too little.
    """
    distillation = plan.distillation
    if distillation is None or not distillation.public_source:
        return ()
    return read_public(distillation.public_source, plan.config.data)


def teachers_of(plan: DistillationPlan | None, state: ServerState, round_num: int) -> Teachers | None:
    """Return where the teachers of a round are kept, None where it has no step."""
    if plan is None or not plan.is_due(round_num):
        return None
    return Teachers(state.adapter, round_num, plan.numbers.max_teachers)


def undistilled(state: ServerState) -> ServerState:
    """Return the state as it was before a distillation after what is no longer the last round.

    So a run that goes on with more rounds has the bits of one that was planned with them.
    """
    if state.undistilled is None:
        return state
    *earlier, last = state.records
    last = replace(
        last, distillation=None, adapter=state.undistilled.digest, held_out={}, personal_held_out={}
    )
    return replace(state, adapter=state.undistilled, undistilled=None, records=(*earlier, last))


def distilled(
    session: Session, before: ServerState, after: ServerState, adapters: Sequence[ClientAdapter]
) -> tuple[AdapterState, DistillationRecord]:
    """Return the adapter a round ends with and what the step did.

    `before` is the state the clients started from, `after` the aggregate of their updates, which stays where
    the step fails or its gate refuses.
    """
    began = time.perf_counter()
    try:
        adapter, record = _step(session, before, after, adapters)
    except FedLLMError as error:
        adapter, record = after.adapter, DistillationRecord(kept=False, reason=str(error))
    except (MemoryError, torch.OutOfMemoryError):
        reason = "out of memory; lower distill.max-tokens or distill.batch-size"
        adapter, record = after.adapter, DistillationRecord(kept=False, reason=reason)
    except (RuntimeError, OSError) as error:  # what torch and the disk raise
        adapter, record = (
            after.adapter,
            DistillationRecord(kept=False, reason=f"it failed: {first_line(error)}"),
        )
    return adapter, replace(record, seconds=time.perf_counter() - began)


def server_engine(session: Session) -> Engine:
    """Return the engine on this process's base model: in a local run that of its clients, and no second one.

    Raises:
        ModelError, LayoutError: this machine has no such base model.
    """
    config = session.config
    return session.resident.engine(config.model, session.layout, config.train.token_budget)


def _step(
    session: Session, before: ServerState, after: ServerState, adapters: Sequence[ClientAdapter]
) -> tuple[AdapterState, DistillationRecord]:
    if not adapters:
        raise RunFailedError("no client of the round is left to teach")
    config, engine = session.config, server_engine(session)
    plan = distillation_of(session.plan)
    with with_base_delta(engine.base, before.base_delta):  # what the clients' adapters were trained on
        gates = Gates(session, engine, adapters, after.round_num, session.folder)
        screen = gates if plan.is_screened else anything
        material = make_material(session.plan, session.public_text, engine, adapters, after.round_num, screen)
    nothing = AdapterState(session.layout, torch.zeros(session.layout.size))
    base = loss_of(engine, nothing, material.held_out, material.held_out_domains).mean
    with with_base_delta(engine.base, before.base_delta):
        taught = _taught(config, engine, adapters, material, base)
    targets, clients = taught.targets, [adapter.client_id for adapter in adapters]
    with with_base_delta(engine.base, after.base_delta):
        learnt = _learnt(config, engine, after, material, targets)
    error = error_of_gain(learnt.before, learnt.after) if math.isfinite(learnt.after.mean) else None
    kept, reason = judged(
        learnt.before.mean,
        learnt.after.mean,
        material.texts.held_out_kind,
        error=error or 0.0,
        teacher=taught.ensemble,
        own=learnt.own,
    )
    record = DistillationRecord(
        kept=kept,
        reason=f"{reason}{taught.note}",
        texts=material.texts,
        teachers=DistillationTeachers(
            kind=taught.teacher,
            number=len(adapters),
            entropy=targets.entropy,
            weights=weights_by_domain(targets.weights_NK, clients, material.rows, material.domains),
        ),
        losses=DistillationLosses(
            base=base,
            ensemble=taught.ensemble,
            held_out=LossChange(learnt.before.mean, learnt.after.mean),
            error=error,
            control=learnt.control,
            domains={
                domain: LossChange(loss, learnt.after.domains.get(domain, math.nan))
                for domain, loss in learnt.before.domains.items()
            },
            own=learnt.own,
        ),
        num_tokens=learnt.num_tokens,
        target_bytes=targets.num_bytes,
    )
    return learnt.adapter if kept else after.adapter, record


def _learnt(
    config: RunConfig, engine: Engine, after: ServerState, material: Material, targets: Targets
) -> _Learnt:
    """Return what the aggregate learns from the targets, with its losses on held-out rows before and after.

    A student that diverged has no loss, and the gate will say so.
    """

    def measured(adapter: AdapterState) -> Loss:
        return loss_of(engine, adapter, material.held_out, material.held_out_domains)

    training, before = student_training(config, after.round_num), measured(after.adapter)
    learnt = _Learnt(after.adapter, before, Loss(math.nan, {}), 0)
    with suppress(NonFiniteError):
        result = distil(engine, after.adapter, targets, training)
        own = own_losses(engine, material, after.adapter, result.adapter)
        learnt = _Learnt(result.adapter, before, measured(result.adapter), result.num_tokens, own)
    if config.distill.control:
        with suppress(NonFiniteError):
            tuned = supervised(engine, after.adapter, material.rows, training).adapter
            learnt = replace(learnt, control=measured(tuned).mean)
    return learnt


def own_losses(
    engine: Engine, material: Material, before: AdapterState, after: AdapterState
) -> LossChange | None:
    """Return the losses of two adapters on the clients' own texts, None where there are none apart."""
    if not material.own:
        return None
    names = ("",) * len(material.own)
    old, new = (loss_of(engine, adapter, material.own, names).mean for adapter in (before, after))
    return LossChange(old, new)


def _taught(
    config: RunConfig, engine: Engine, adapters: Sequence[ClientAdapter], material: Material, base: float
) -> _Taught:
    """Return what the chosen teacher says, or the uniform one where public text is in no client's support.

    Posterior weights on text that no client models are noise that looks certain: where the mixture's own loss
    is above the base model's loss `base`, all teachers count alike.
    """
    numbers = config.distill
    teacher = Teacher(
        adapters=tuple(adapter.vector for adapter in adapters),
        layout=engine.layout,
        priors=priors_of(adapters),
        kind=numbers.teacher,
        temper=numbers.temper,
    )
    ensemble, note = teach(engine, teacher, material.held_out, top_k=numbers.top_k).loss, ""
    if teacher.kind == "posterior" and material.texts.held_out_kind == PUBLIC and not ensemble <= base:
        note = (
            f" (the public text is in no client's support: posterior {ensemble:.3f} is worse than the base"
            f" model's {base:.3f}, so all clients weighed alike)"
        )
        teacher = replace(teacher, kind="uniform")
        ensemble = teach(engine, teacher, material.held_out, top_k=numbers.top_k).loss
    targets = teach(engine, teacher, material.rows, top_k=numbers.top_k)
    return _Taught(targets, teacher.kind, note, ensemble)


def student_training(config: RunConfig, round_num: int) -> StudentTraining:
    """Return how the student of a round is trained."""
    numbers = config.distill
    return StudentTraining(
        steps=numbers.steps,
        batch_size=numbers.batch_size,
        learning_rate=numbers.learning_rate,
        pull=numbers.pull,
        seed=derive_seed(config.seed, "distillation", round_num),
    )


def end_with_distillation(
    session: Session, before: ServerState, after: ServerState, record: RoundRecord, teachers: Teachers
) -> tuple[ServerState, RoundRecord, HeldOut | None]:
    """Let the clients' adapters teach the aggregate; it stays where the step fails or a gate refuses.

    Returns the state, the record and, where clients were asked, their losses under the adapter that was kept.
    """
    adapter, outcome = distilled(session, before, after, teachers.without(record.aggregation.silenced))
    is_last = session.config.distill.when == "last"
    undistilled = after.adapter if is_last and outcome.kept else None
    state, held_out = replace(after, adapter=adapter, undistilled=undistilled), None
    if outcome.kept and distillation_of(session.plan).asks_clients:
        asked = ask_clients(session, after, state, outcome)
        state, outcome, held_out = asked.state, asked.record, asked.held_out
    session.watch.notice(f"round {record.round_num}: {describe_step(outcome)}")
    return state, replace(record, distillation=outcome, adapter=state.adapter.digest), held_out
