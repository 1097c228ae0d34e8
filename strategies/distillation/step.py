"""The distillation step in its order: make texts, ask the teacher, train the student, judge it.

The teacher is the mixture of the clients' adapters, which the server has from the round anyway; the student
is the aggregate of their updates; the loss is the forward KL of `fedllm.distillation`.
"""

from collections.abc import Sequence

from fedllm.adapters.layout import AdapterState
from fedllm.engine.engine import Engine
from fedllm.models.with_base_delta import with_base_delta
from fedllm.plan.run_plan import distillation_of
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import DistillationLosses, DistillationRecord, DistillationTeachers, LossChange
from strategies.distillation.gate import judge_losses, judge_teacher
from strategies.distillation.learn import measure_held_out, student_training, train_student
from strategies.distillation.losses import Loss, measure_base
from strategies.distillation.material import Material, make_material, pass_all
from strategies.distillation.originality import text_screen
from strategies.distillation.synthetic_text import writers_of
from strategies.distillation.teach import Chosen, ask_teacher, choose_teacher
from strategies.distillation.teachers import ClientAdapter
from strategies.session import Session


def open_engine(session: Session) -> Engine:
    """Return the engine on this process's base model; in a local run it is that of the clients.

    Raises:
        ModelError, LayoutError: this machine has no such base model.
    """
    config = session.config
    return session.resident.engine(config.model, session.layout, config.train.token_budget)


def trained_since_asked(before: ServerState, after: ServerState, *, is_first: bool) -> list[str]:
    """Return the clients whose rows the texts may repeat: those that trained since their nodes were asked.

    That is in this round, or where this is the first step in any round. A site answers no more often than it
    trains (`clients.gate`).
    """
    earlier = {} if is_first else before.num_drawn
    return [name for name, number in after.num_drawn.items() if number > earlier.get(name, 0)]


def distil_aggregate(
    session: Session, before: ServerState, after: ServerState, adapters: Sequence[ClientAdapter]
) -> tuple[AdapterState, DistillationRecord]:
    """Return the adapter that a round ends with, and what the step did.

    `before` is the state that the clients started from, `after` the aggregate of their updates.

    Raises:
        FedLLMError: the base model is absent, or there is no text to distil on.
    """
    plan, config, engine = distillation_of(session.plan), session.config, open_engine(session)
    base_model, round_num = engine.base, after.round_num
    writers = writers_of(session.plan, engine, adapters, round_num)
    asked = trained_since_asked(before, after, is_first=plan.numbers.when == "last")
    screen = text_screen(session, engine, adapters, round_num, asked) if plan.is_screened else pass_all
    with with_base_delta(base_model, before.base_delta):  # what the clients' adapters were trained on
        material = make_material(plan, session.public_text, writers, screen)
    base = measure_base(engine, material.held_out)  # of the base model as published, without any delta
    with with_base_delta(base_model, before.base_delta):
        chosen = choose_teacher(engine, plan.numbers, adapters, material, base)
    with with_base_delta(base_model, after.base_delta):  # what the aggregate will be used on
        aggregate = measure_held_out(engine, after.adapter, material)
    if reason := judge_teacher(aggregate.mean, chosen.loss, material.texts.held_out_kind):
        return after.adapter, _not_taught(f"{reason}{chosen.note}", material, chosen, aggregate, base)
    with with_base_delta(base_model, before.base_delta):
        lesson = ask_teacher(engine, chosen, plan.numbers.top_k, adapters, material)
    with with_base_delta(base_model, after.base_delta):
        training = student_training(plan.numbers, config.seed, round_num)
        student = train_student(
            engine,
            after.adapter,
            material,
            lesson,
            training,
            before=aggregate,
            base=base,
            with_control=plan.numbers.control,
        )
    kind = material.texts.held_out_kind
    kept, reason = judge_losses(student.losses, kind, asks_clients=plan.asks_clients)
    record = DistillationRecord(
        kept=kept,
        reason=f"{reason}{chosen.note}",
        texts=material.texts,
        teachers=lesson.teachers,
        losses=student.losses,
        num_tokens=student.num_tokens,
        target_bytes=lesson.targets.num_bytes,
    )
    return student.adapter if kept else after.adapter, record


def _not_taught(
    reason: str, material: Material, chosen: Chosen, aggregate: Loss, base: float
) -> DistillationRecord:
    """Return the record of a step that ended before anything was taught: the aggregate's losses stand."""
    losses = DistillationLosses(
        base=base, ensemble=chosen.loss, held_out=LossChange(aggregate.mean, aggregate.mean)
    )
    teachers = DistillationTeachers(kind=chosen.teacher.kind, number=len(chosen.teacher.adapters))
    return DistillationRecord(
        kept=False, reason=reason, texts=material.texts, teachers=teachers, losses=losses
    )
