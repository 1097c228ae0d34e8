"""The very message that leaves a client after its protection, as a server reads it.

One client's round is done again with the run's configuration: through `clients.train`, its protection and the
codec of the wire. Secrets and budgets are the audit's own, in a folder that is thrown away: the noise is
another draw of the same distribution, and no ledger of the run is charged. It starts from the finished
adapter, since from B = 0 the first step leaves no trace in A, which protects round 1 only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from clients.data_holder import DataHolder
from clients.protect import node_mean
from clients.techniques import plan_node_round
from clients.train import prepare_clients, train_clients
from fedllm.adapters.base_delta import no_base_delta
from fedllm.adapters.layout import AdapterLayout, AdapterState, at_rank, with_rank
from fedllm.errors import RunFailedError
from fedllm.messages import ClientFailure, ClientUpdate, TrainRequest
from fedllm.models.chat import Encoded
from fedllm.plan.run_plan import fixed_keys
from fedllm.runs.checkpoint import load_checkpoint
from fedllm.wire import replies
from scripts.auditing.opening import Case


@dataclass(frozen=True, eq=False)
class Message:
    """What a server read: vectors [P] of `layout` by what they are, and the rows that were trained on."""

    clients: tuple[str, ...]
    part: str
    layout: AdapterLayout
    start: torch.Tensor
    vectors: Mapping[str, torch.Tensor]
    rows: tuple[Encoded, ...]


def leaving_message(case: Case) -> Message:
    """Return what leaves one client in a round, as a server reads it, or a node where it sends one sum.

    It is the client with fewest rows, whose message hides least.

    Raises:
        RunFailedError: the client cannot do the round.
    """
    holder, layout, plan = case.holder, case.holder.engine.layout, case.holder.plan
    request = request_of(case)
    answers = train_clients(holder, request)
    payload, round_num = plan.config.wire.codec, request.round_num
    part = plan.aggregation.returned_in(round_num)
    if plan.is_summed(request.ranks.values()):
        mean_P = node_mean([one for one in answers if isinstance(one, ClientUpdate)])
        content = replies.write_sum(answers, mean_P, layout=layout, part=part, payload=payload)
        update = replies.read_sum(content, layout=layout, part=part, round_num=round_num, most=len(answers))[
            0
        ]
    else:
        content = replies.write_updates(answers, layout=layout, part=part, payload=payload)
        (update,) = replies.read_updates(
            content,
            layout=layout,
            ranks=request.ranks,
            part=part,
            round_num=round_num,
            with_controls=request.control is not None,
        )
    if isinstance(update, ClientFailure):
        raise RunFailedError(f"client {update.client_id} cannot do a round again: {update.code}")
    vectors = {"update": update.delta}
    if update.control_delta is not None:
        vectors["control variate"] = update.control_delta
    return message_of(case, request, vectors)


def message_of(case: Case, request: TrainRequest, vectors: Mapping[str, torch.Tensor]) -> Message:
    """Return what a server read in answer to a request, next to the rows that were trained on for it."""
    layout = case.holder.engine.layout
    rank = min(request.ranks.values())  # several clients of one sum have the same
    return Message(
        clients=tuple(request.drawn),
        part=case.holder.plan.aggregation.returned_in(request.round_num),
        layout=at_rank(layout, rank),
        start=with_rank(request.adapter.vector, layout, rank),
        vectors=vectors,
        rows=tuple(_trained_rows(case.holder, request)),
    )


def request_of(case: Case) -> TrainRequest:
    """Return what the run's server would ask of the client, or of all in a sum, from the adapter on."""
    holder, plan, layout = case.holder, case.holder.plan, case.holder.engine.layout
    able = [name for name, client in holder.clients.items() if client.train]
    is_summed = plan.aggregation.node_sum or plan.secure is not None
    names = able if is_summed else [smallest_client(holder)]
    ranks = plan.ranks(holder.clients)
    adapter, base_delta = case.adapter, no_base_delta(case.adapter.layout)
    if adapter.layout != layout:  # the run added to the base model, and the published adapter has that too
        state, _ = load_checkpoint(case.folder / "checkpoints", fixed_keys(case.config), layout)
        adapter, base_delta = state.adapter, state.base_delta
    with_controls = plan.config.train.control_variates
    return TrainRequest(
        # Where factors alternate, the round that trains A is attacked.
        round_num=next((number for number in (1, 2) if plan.aggregation.trained_in(number) != "b"), 1),
        drawn=dict.fromkeys(names, 0),
        ranks={name: ranks[name] for name in names},
        adapter=adapter,
        base_delta=base_delta,
        plan_digest=plan.digest,
        control=AdapterState(layout, torch.zeros(layout.size)) if with_controls else None,
        clip=plan.privacy.clip if plan.privacy is not None and plan.privacy.is_central else 0.0,
    )


def smallest_client(holder: DataHolder) -> str:
    """Return the client with fewest rows to train on, whose message hides least."""
    able = [name for name, client in holder.clients.items() if client.train]
    return min(able, key=lambda name: (len(holder.clients[name].train), name))


def _trained_rows(holder: DataHolder, request: TrainRequest) -> Iterator[Encoded]:
    """Yield the rows that the clients of a request train on, as they draw them."""
    labels = dict.fromkeys(request.drawn, b"")  # of a secret sum; no row depends on it
    for work in prepare_clients(plan_node_round(holder, request, labels=labels), request.drawn):
        yield from (row for batch in work.job.batches for row in batch)
