"""How a round with a distillation step ends: with the student where every gate lets it pass."""

from dataclasses import replace

from fedllm.distillation.wanted import asks_clients
from fedllm.runs.checkpoint import ServerState
from fedllm.types import RoundRecord
from strategies.distillation.gate import ask_clients
from strategies.distillation.step import distilled
from strategies.distillation.teachers import Teachers
from strategies.distillation.words import sentence
from strategies.evaluation import HeldOut
from strategies.session import Session


def distil(
    session: Session, before: ServerState, after: ServerState, record: RoundRecord, teachers: Teachers
) -> tuple[ServerState, RoundRecord, HeldOut | None]:
    """Let the clients' adapters teach the aggregate; it stays where the step fails or a gate refuses.

    Returns the state, the record and, where clients were asked, their losses under the adapter that was kept.
    """
    adapter, outcome = distilled(session, before, after, teachers.without(record.silenced))
    is_last = session.config.distill.when == "last"
    undistilled = after.adapter if is_last and outcome.kept else None
    state, held_out = replace(after, adapter=adapter, undistilled=undistilled), None
    if outcome.kept and asks_clients(session.config):
        asked = ask_clients(session, after, state, outcome)
        state, outcome, held_out = asked.state, asked.record, asked.held_out
    session.watch.notice(f"round {record.round_num}: {sentence(outcome)}")
    return state, replace(record, distil=outcome, adapter=state.adapter.digest), held_out
