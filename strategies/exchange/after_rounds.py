"""After the last round: held-out losses that are missing yet, and clients that train on at home."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

from fedllm.config.key import number_or
from fedllm.errors import NoDataError, WireError, WithheldError
from fedllm.messages import ClientAtHome
from fedllm.plan.training import HomeTraining
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import HomeRecord
from fedllm.wire import replies
from strategies.divergence import check_finite
from strategies.exchange.causes import few, grouped
from strategies.exchange.evaluation import evaluate
from strategies.exchange.last_sums import end_keys, publish_own
from strategies.exchange.requesting import requests_about
from strategies.exchange.validation import check_at_home
from strategies.grid.transport import Reply
from strategies.session import Session

ADAPT = "query.adapt"
_TOO_FEW = "it has no row to train on, or fewer than two different ones held out"


def evaluate_last(session: Session, state: ServerState) -> ServerState:
    """Return the state with the held-out losses of a run that ends here; raises as `check_finite`."""
    if not state.records or state.records[-1].held_out:  # `evaluation.every` may have fallen on it
        return state
    *earlier, last = state.records
    last = evaluate(session, state).noted_in(last)
    state = replace(state, records=(*earlier, last))
    check_finite(session.config, state, last, is_saved=True)
    return state


def train_on_at_home(session: Session, state: ServerState) -> ServerState:
    """Let each client train the shared adapter on; return the state with what it gave in its last record.

    It is returned as it is where the run has no such step, or has done it before it was interrupted.
    """
    numbers = session.plan.at_home
    if numbers is None or not state.records or state.records[-1].at_home is not None:
        return state
    found: dict[str, ClientAtHome] = {}
    transport, number, num_answered = session.transport, len(session.clients), 0
    hosted, down, up = session.by_node(session.clients), transport.bytes_down, transport.bytes_up
    requests = requests_about(session, state, session.clients)
    session.watch.phase("training on at home", 0, number)
    with few(session.watch.notice) as notice:
        for node in sorted(hosted.keys() - requests.keys()):
            notice(f"node {node} did not train on at home: it is away or busy")
        for reply in transport.exchange(
            requests,
            message_type=ADAPT,
            group=str(state.round_num),
            deadline=_deadline(session, numbers),
        ):
            asked = hosted.get(reply.node_id, [])
            found |= _read(session, numbers, reply, asked, notice)
            num_answered += len(asked)
            session.watch.phase("training on at home", num_answered, number)
    if not numbers.is_reported:
        session.watch.notice("clients have trained on at home; under the privacy plan no loss of that leaves")
    *earlier, last = state.records
    last = replace(
        last,
        at_home=HomeRecord.of(found.values()),
        bytes_down=last.bytes_down + transport.bytes_down - down,
        bytes_up=last.bytes_up + transport.bytes_up - up,
    )
    return replace(state, records=(*earlier, last))


def _deadline(session: Session, numbers: HomeTraining) -> float:
    """Return how long to wait: what the rounds' trainings with as many steps might have taken.

    A node's clients all train on, while a round may have asked only some of them.
    """
    federation, train = session.config.federation, session.config.train
    round_seconds = number_or(federation.round_deadline, session.transport.usual_deadline("train"))
    rounds = ceil(numbers.most / train.local_steps) * len(session.clients) / session.plan.cohort.size
    return round_seconds * (1 + rounds)


def _read(
    session: Session,
    numbers: HomeTraining,
    reply: Reply,
    asked: Sequence[str],
    notice: Callable[[str], None],
) -> dict[str, ClientAtHome]:
    """Return the sound answers of the clients that a node was asked for; of the others there is a notice."""
    try:
        answers = replies.read_at_home(reply.received(), most=len(asked))
    except WireError as error:
        session.held_by_nodes.forget(reply.node_id, reply.content)
        notice(f"node {reply.node_id} did not train on at home: {error}")
        return {}
    found, lost = {}, {}
    for answer in (answer for answer in answers if answer.client_id in asked):
        sound = check_at_home(answer, numbers.training.steps) if isinstance(answer, ClientAtHome) else answer
        if isinstance(sound, ClientAtHome):
            found[sound.client_id] = sound
        elif numbers.is_reported or sound.code != WithheldError.code:
            lost[sound.client_id] = _TOO_FEW if sound.code == NoDataError.code else sound.reason
    for clients, reason in grouped(lost):
        notice(f"client {clients} did not train on at home: {reason}")
    return found if numbers.is_reported else {}


# What follows the last round, in this order; a run saves its state after each that changes it.
LAST_STEPS = (train_on_at_home, publish_own, end_keys)
