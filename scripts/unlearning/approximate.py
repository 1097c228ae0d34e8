"""Class D of unlearning: a client's share is taken out of the finished adapter, on the machine of its rows.

The client takes part one last time: it does its turns again (subtraction) or trains the adapter away from its
rows (ascent). Nothing is guaranteed; `scripts.unlearning.verify` measures what is left.
"""

from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from clients.data_holder import DataHolder
from clients.train import train_clients
from fedllm.adapters.layout import AdapterState, at_rank, with_rank
from fedllm.distillation.student import StudentTraining
from fedllm.errors import CheckpointError, ConfigError, RunFailedError
from fedllm.messages import ClientFailure, TrainRequest
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import ServerState, newest_checkpoint
from fedllm.seeds import derive_seed
from strategies.unlearning.ascent import ascend, away_from
from strategies.unlearning.subtraction import Turn, subtract

METHODS = ("ascent", "subtraction")


@dataclass(frozen=True, eq=False)
class Case:
    """A client to forget: the holder of its rows, and the states that its run has kept, oldest first.

    They end with the finished adapter, and for subtraction begin before round 1.
    """

    holder: DataHolder
    client: str
    states: tuple[ServerState, ...]

    @property
    def final(self) -> ServerState:
        """The state after the last round."""
        return self.states[-1]


def kept_states(checkpoints: Path, initial: AdapterState) -> tuple[ServerState, ...]:
    """Return the states that a run has kept, oldest first, from the adapter that it began with.

    Raises:
        CheckpointError: no checkpoint is intact.
        ConfigError: the run began with another adapter than its seed gives.
    """
    found = [newest_checkpoint(checkpoints)[0]]
    with suppress(CheckpointError):  # there is no earlier one
        while True:
            found.append(newest_checkpoint(checkpoints, found[-1].round_num - 1)[0])
    if found[0].records[0].adapter != initial.digest:
        raise ConfigError(f"{checkpoints.parent}: the run began with an adapter of its own; use ascent")
    return (ServerState(0, initial), *reversed(found))


def refusal_of(plan: RunPlan, method: str) -> str:
    """Return why a run cannot be unlearnt by a method, "" where it can."""
    rule = plan.aggregation
    if method not in METHODS:
        return f"expected one of {', '.join(METHODS)}"
    if plan.privacy is not None:
        return "it would read rows outside their privacy budget"
    if plan.secure is not None:
        return "it would show one client's share of the sums that secure.method hides"
    if rule.local_b:
        return "under aggregation.read-out = 'local-b' the published adapter changes nothing by itself"
    if method == "ascent":
        if rule.read_out in {"residual", "stack"}:
            return f"aggregation.read-out = {rule.read_out!r} adds to the base model; use subtraction"
        return ""
    if rule.robust != "none" or not rule.optimizer.is_plain or plan.distillation is not None:
        return "a robust rule, a server optimizer or a distillation is no plain mean of updates; use ascent"
    if plan.config.train.control_variates or plan.personal is not None:
        return "its clients keep vectors of their own, with which a turn cannot be done again; use ascent"
    return ""


def forget(case: Case, method: str) -> AdapterState:
    """Return the final adapter of a run without the share of a client.

    Raises:
        ConfigError: the run cannot be unlearnt so.
        RunFailedError: the client cannot do its turns again.
        NonFiniteError: ascent diverged.
    """
    plan, client = case.holder.plan, case.holder.clients[case.client]
    if reason := refusal_of(plan, method):
        raise ConfigError(f"{plan.config.run.name}: no unlearning by {method}: {reason}")
    num_turns = sum(case.client in record.accepted for record in case.final.records)
    if not num_turns:  # it has taught nothing
        return case.final.adapter
    if method == "subtraction":
        return subtract(case.final, turns_of(case))
    train = plan.config.train
    training = StudentTraining(  # as many steps as the client has taken to teach
        steps=num_turns * train.local_steps,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        seed=derive_seed(plan.config.seed, "unlearning", case.client),
    )
    objective = away_from(case.holder.engine, client.train)
    return ascend(case.holder.engine, case.final.adapter, objective, client.held_out, training)


def turns_of(case: Case) -> list[Turn]:
    """Return every turn of the client, done again from the newest state that is kept from before it.

    Raises:
        RunFailedError: the client cannot do one.
    """
    layout, rank = case.holder.engine.layout, case.holder.plan.ranks(case.holder.clients)[case.client]
    turns: list[Turn] = []
    for before, after in pairwise(case.states):
        for record in case.final.records:
            if not (
                before.round_num < record.round_num <= after.round_num and case.client in record.accepted
            ):
                continue
            delta_P = _turn_again(case, before, record.round_num, rank, num_done=len(turns))
            share = record.weights[case.client] / sum(record.weights.values())
            turns.append(Turn(share, with_rank(delta_P, at_rank(layout, rank), layout.rank), before, after))
    return turns


def _turn_again(case: Case, before: ServerState, round_num: int, rank: int, *, num_done: int) -> torch.Tensor:
    """Return the client's change [P] at its own rank in a round, after so many turns, from a state."""
    plan = case.holder.plan
    training = plan.training(round_num)
    request = TrainRequest(
        round_num=round_num,
        drawn={case.client: num_done * training.steps * training.batch_size},
        ranks={case.client: rank},
        adapter=before.adapter,
        base_delta=before.base_delta,
        plan_digest=plan.digest,
    )
    (answer,) = train_clients(case.holder, request)
    if isinstance(answer, ClientFailure):
        raise RunFailedError(f"client {case.client} cannot do round {round_num} again: {answer.code}")
    return answer.delta
