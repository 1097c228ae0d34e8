"""What a node does with a train request: it trains the clients that the request names."""

from collections.abc import Mapping
from dataclasses import replace

from clients.coarse import coarse_update
from clients.data_holder import DataHolder
from clients.evaluate import evaluate_clients
from clients.jobs import begin_clients
from clients.protect import protect_clients
from clients.same_rows import refuse_edited
from clients.state import PrivateStore, save_private
from clients.technique import NodeRound, Works, failure_of
from clients.techniques import plan_node_round
from fedllm.errors import CheckpointError, ConfigError
from fedllm.messages import ClientEvaluation, ClientFailure, ClientUpdate, EvaluateRequest, TrainRequest
from fedllm.models.with_base_delta import with_base_delta
from fedllm.site_policy import load_policy


def train_clients(
    holder: DataHolder,
    request: TrainRequest,
    *,
    weighting: str = "",
    labels: Mapping[str, bytes] | None = None,
) -> list[ClientUpdate | ClientFailure]:
    """Return one answer per client the request names, in its order.

    What clients keep for themselves is on disk before an answer is given: a client that cannot keep it fails.
    `weighting` replaces the plan's own; `labels` are those of secret sums, by client. Where the request asks
    for it, the held-out loss of the adapter that clients start from goes with their updates, as it would in
    an answer to an evaluate request.

    Raises:
        ConfigError: a client is asked to train at a rank this machine has no room for.
        WithheldError: held-out losses are asked for, and the privacy plan keeps them with the clients.
    """
    if 0 < holder.max_rank < max(request.ranks.values(), default=0):
        raise ConfigError(
            f"the server asks for rank {max(request.ranks.values())}, and this node's max-rank is"
            f" {holder.max_rank}"
        )
    this_round = plan_node_round(holder, request, weighting=weighting, labels=labels)
    able = [name for name in request.drawn if name in holder.clients and holder.clients[name].num_rows]
    failed = refuse_edited(holder, {name: request.drawn[name] for name in able})
    for technique in this_round.techniques:
        failed.update(technique.refuse(this_round, able))
    drawn = {name: request.drawn[name] for name in able if name not in failed}
    held_out = _held_out(holder, request, drawn) if request.evaluate else {}
    # Everything trains on the base model with the base delta, the techniques' own adapters too.
    with with_base_delta(holder.engine.base, holder.base_deltas.keep(request.base_delta)):
        works = prepare_clients(this_round, drawn)
        results = holder.engine.train([work.job for work in works])
        works = [replace(work, result=result) for work, result in zip(works, results, strict=True)]
        works, diverged = protect_clients(this_round, works)
    # After protection, since what a client keeps may depend on what has left it (SCAFFOLD's c_i).
    unsaved = _save_kept(holder.store, works, this_round.training.steps * this_round.training.batch_size)
    works = [work for work in works if work.client.client_id not in unsaved]
    failed.update({**diverged, **unsaved})
    # Last, since all that can fail has not: what is charged leaves, and until then nothing has.
    for technique in this_round.techniques:
        failed.update(technique.charge(this_round, works))
    updates = {work.client.client_id: work.sent for work in works}
    if not load_policy().allow.exact_numbers:
        updates = {name: coarse_update(update) for name, update in updates.items()}
    updates = {name: replace(update, held_out=held_out.get(name)) for name, update in updates.items()}
    answers: dict[str, ClientUpdate | ClientFailure] = {**updates, **failed}
    return [answers.get(name, ClientFailure(client_id=name, code="no-data")) for name in request.drawn]


def _held_out(
    holder: DataHolder, request: TrainRequest, drawn: Mapping[str, int]
) -> dict[str, ClientEvaluation]:
    """Return by name the held-out loss that each client in `drawn` has of the adapter in the request."""
    question = EvaluateRequest(
        round_num=request.round_num,
        drawn=drawn,
        adapter=request.adapter,
        base_delta=request.base_delta,
        plan_digest=request.plan_digest,
    )
    answers = evaluate_clients(holder, question)
    return {each.client_id: each for each in answers if isinstance(each, ClientEvaluation)}


def prepare_clients(this_round: NodeRound, drawn: Mapping[str, int]) -> Works:
    """Return the work of each client in `drawn` as the techniques have it done."""
    works = begin_clients(this_round, drawn)
    for technique in this_round.techniques:
        works = technique.prepare(this_round, works)
    return works


def _save_kept(store: PrivateStore, works: Works, num_rows: int) -> dict[str, ClientFailure]:
    """Write what each client keeps after drawing `num_rows` more rows; return those that could not.

    All vectors of a client are in one file a state, so that they always belong together.
    """
    failed = {}
    for work in (work for work in works if work.keeps):
        name = work.client.client_id
        try:
            save_private(store, name, work.num_drawn + num_rows, work.keeps)
        except CheckpointError as error:  # its update would not match what it has next round
            failed[name] = failure_of(name, error)
    return failed
