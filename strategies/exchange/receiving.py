"""What comes back from nodes, as one answer for every client asked: a sound update or why there is none."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import TypeAlias

from flwr.app import RecordDict

from fedllm.adapters.layout import at_rank
from fedllm.engine.optimizer import largest_move
from fedllm.errors import WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.runs.records import RoundPlan
from fedllm.wire import refusals, replies
from strategies.cohort.late_updates import late_refusal
from strategies.cohort.voices import largest_weight, limited
from strategies.exchange.causes import few
from strategies.exchange.validation import UNSOUND, find_fault
from strategies.grid.transport import Reply
from strategies.memory import Room
from strategies.session import Session

Answer: TypeAlias = ClientUpdate | ClientFailure
# What a node's reply says of the clients that were asked, where that is no plain update.
Read: TypeAlias = Callable[[RecordDict, Sequence[str]], Iterable[Answer]]


def members_of(answer: Answer) -> Sequence[Answer]:
    """Return the answer of every client that an answer stands for: the members of a sum, else itself."""
    return (isinstance(answer, ClientUpdate) and answer.members) or (answer,)


def sort_answers(
    answers: Iterable[Answer], order: Iterable[str], room: Room
) -> Generator[Answer, None, None]:
    """Yield answers in the plan's order, each as soon as all before it are there; late ones by name, last.

    Floating-point sums depend on their order; this makes a round independent of who was faster. Updates that
    wait for others do so in `room`.
    """
    held: dict[str, Answer | None] = {}  # None stands for a member of a sum, which came with the first
    waiting = iter(order)
    current = next(waiting, None)
    for answer in answers:
        held.update(dict.fromkeys((member.client_id for member in members_of(answer)), None))
        held[answer.client_id] = answer  # a sum comes at the place of its first member
        while current in held:
            ready = held.pop(current)
            if ready is not None:
                yield ready
            current = next(waiting, None)
        if isinstance(answer, ClientUpdate) and answer.client_id in held:
            held[answer.client_id] = _kept(answer, room)
    for client in [*chain([current], waiting), *sorted(held)]:
        ready = held.pop(client, None) if client is not None else None
        if ready is not None:
            yield ready


def _kept(update: ClientUpdate, room: Room) -> ClientUpdate:
    control = update.control_delta
    return replace(
        update,
        delta=room.keep(update.delta),
        control_delta=None if control is None else room.keep(control),
    )


def receive(
    session: Session, plan: RoundPlan, contents: Mapping[int, RecordDict], read: Read | None = None
) -> Generator[Answer, None, None]:
    """Yield answers as they arrive, until the round has its number of updates or all clients have answered.

    An answer is a sound update or the reason why there is none. Late updates of earlier rounds come too,
    where they count; of those that are unsound or too late there is only a notice. `read` is as in
    `read_reply`.
    """
    may_stop = len(plan.asked) > plan.cohort_size or session.transport.keeps_late
    number = plan.cohort_size
    with closing(
        _receive_all(session, plan, contents, read)
    ) as answers:  # at once: what is left counts as late
        for answer in answers:
            yield answer
            number -= len(members_of(answer)) if isinstance(answer, ClientUpdate) else 0
            if may_stop and number <= 0:
                return


def _receive_all(
    session: Session, plan: RoundPlan, contents: Mapping[int, RecordDict], read: Read | None
) -> Generator[Answer, None, None]:
    asked, largest_staleness = session.by_node(plan.asked), session.config.federation.max_staleness
    arriving = session.transport.exchange(
        contents,
        message_type="train",
        group=str(plan.round_num),
        deadline=plan.deadline,
        plan=plan,
    )
    with few(session.watch.notice) as notice:
        for reply in arriving:
            sent = reply.plan or plan  # a late reply is checked against the round that asked for it
            named = asked if sent is plan else session.by_node(sent.asked)
            for answer in read_reply(session, sent, reply, named.get(reply.node_id, []), read):
                refused = sent is not plan and late_refusal(answer, plan.round_num, largest_staleness)
                if refused:
                    notice(refused)
                    continue
                for each in members_of(answer):
                    session.watch.client(plan.round_num, each)
                yield answer


def read_reply(
    session: Session, plan: RoundPlan, reply: Reply, asked: list[str], read: Read | None = None
) -> Generator[Answer, None, None]:
    """Yield one answer for each client of a node that was asked; what it says of others is ignored.

    The sum of a node's clients is one answer for all of them, sound or lost as a whole. `read` takes what
    comes in place of plain updates, and checks it.
    """
    unanswered = dict.fromkeys(asked, "its node did not answer for it")
    answers: Iterable[Answer] = ()
    reported = refusals.read_error(reply.content) if reply.content is not None else None
    try:
        content = reply.received()
        answers = read(content, asked) if read else _answers(session, plan, content, asked)
    except WireError as error:
        unanswered = dict.fromkeys(asked, str(error))
        # The node may not hold what the request left out
        session.held_by_nodes.forget(reply.node_id, reply.content)
    strangers = 0
    for answer in answers:
        if unanswered.pop(answer.client_id, None) is None:  # or answered for twice
            strangers += 1
            continue
        for member in members_of(answer)[1:]:  # the sum itself goes by the name of its first member
            unanswered.pop(member.client_id, None)
        yield from [answer] if read else _checked(session, plan, answer)
    if strangers:
        session.watch.notice(f"node {reply.node_id} answered for {strangers} clients it was not asked for")
    for client, reason in unanswered.items():
        yield ClientFailure(
            client_id=client, code=reported or "lost", reason=reason, sent_nothing=reported is not None
        )


def _answers(
    session: Session, plan: RoundPlan, content: RecordDict, asked: Sequence[str]
) -> Iterable[Answer]:
    """Return what a node's reply says of its clients, as it was asked for; each is read when due."""
    ranks = {client: plan.ranks[client] for client in asked}
    if not session.plan.is_summed(ranks.values()):
        return replies.read_updates(
            content,
            layout=session.layout,
            ranks=ranks,
            part=plan.returned,
            round_num=plan.round_num,
            with_controls=session.config.train.control_variates,
            with_held_out=session.plan.measures_in_training,
        )
    answers = replies.read_sum(
        content,
        layout=session.layout,
        part=plan.returned,
        round_num=plan.round_num,
        most=len(asked),
        with_held_out=session.plan.measures_in_training,
    )
    if not {each.client_id for answer in answers for each in members_of(answer)} <= ranks.keys():
        raise WireError("its node's sum is of clients that were not asked")
    return answers


def _checked(session: Session, plan: RoundPlan, answer: Answer) -> Iterable[Answer]:
    """Return the answer where it is sound, weighing what it may, else a failure of all it stands for."""
    if isinstance(answer, ClientFailure):
        return [answer]
    reason = find_fault(
        answer,
        layout=at_rank(session.layout, plan.ranks[answer.client_id]),
        round_num=plan.round_num,
        largest_weights={
            member.client_id: largest_weight(session.clients[member.client_id], session.plan)
            for member in members_of(answer)
        },
        largest_move=largest_change(session, plan),
        largest_control=2 * plan.training.clip_norm,  # the most between two means of clipped gradients
    )
    if not reason:
        return [limited(answer, plan.most_weights)]
    return [
        ClientFailure(client_id=member.client_id, code=UNSOUND, reason=reason)
        for member in members_of(answer)
    ]


def largest_change(session: Session, plan: RoundPlan) -> float:
    """Return the most by which a value of an honest update can differ from 0.

    That is what the optimizer can have moved it by, plus the noise that a client may have added.
    """
    noise = 0.0 if session.privacy is None else session.privacy.plan.largest_noise
    return largest_move(plan.training, plan.largest_start) + noise
