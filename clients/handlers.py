"""What a node does with each kind of question: records to values, the work, values to records."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from flwr.app import ConfigRecord, Context, RecordDict

from clients.adapt import adapt_clients
from clients.data_holder import DataHolder
from clients.evaluate import evaluate_clients
from clients.join import answer_join
from clients.originality import answer_overlap, check_limit
from clients.protect import node_mean
from clients.secret_sums import OPEN_SUM, TRAIN_SECRETLY, with_run_adapter
from clients.stock import evaluate_for_stock, train_for_stock
from clients.train import train_clients
from fedllm.errors import ConfigError
from fedllm.messages import ClientUpdate, EvaluateRequest
from fedllm.wire import overlaps, packets, replies, requests

Handler: TypeAlias = Callable[[DataHolder, RecordDict, Context], RecordDict]


def _join(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    return answer_join(holder, content, context.node_id)


def _train(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    plan, layout = holder.plan, holder.engine.layout
    request = requests.read_train_request(content, layout, _holding(holder))
    if plan.secure is not None:  # whatever the server asks for: no client's own update leaves in such a run
        return TRAIN_SECRETLY[plan.secure.method](holder, request, content)
    answers = train_clients(holder, request)
    part, codec = plan.aggregation.returned_in(request.round_num), plan.config.wire.codec
    if plan.is_summed(request.ranks.values()):  # the server decides alike, from the same plan and ranks
        mean_P = node_mean([answer for answer in answers if isinstance(answer, ClientUpdate)])
        return replies.write_sum(
            answers, mean_P, layout=layout, part=part, payload=codec, with_held_out=request.evaluate
        )
    return replies.write_updates(
        answers, layout=layout, part=part, payload=codec, with_held_out=request.evaluate
    )


def _unmask(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    secure = holder.plan.secure
    if secure is None:
        raise ConfigError("secure.method is 'none', so nothing is masked in this run")
    return OPEN_SUM[secure.method](holder, content)


def _evaluate(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    request = _evaluate_request(holder, content)
    return replies.write_evaluations(evaluate_clients(holder, request))


def _adapt(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    request = _evaluate_request(holder, content)
    return replies.write_at_home(adapt_clients(holder, request))


def _overlap(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    request = overlaps.read_overlap_request(content)
    # Flower keeps a node's state for the length of a run, even where every message has a new process.
    last = context.state.config_records.get("overlap", ConfigRecord({"round": 0}))
    check_limit(request, packets.scalar_field(last, "round", int), holder.plan.config.federation.num_rounds)
    # Counted before it is answered: a query that fails half-way may have told something.
    context.state["overlap"] = ConfigRecord({"round": request.round_num})
    return overlaps.write_overlaps(answer_overlap(holder, request))


def _evaluate_request(holder: DataHolder, content: RecordDict) -> EvaluateRequest:
    request = requests.read_evaluate_request(content, holder.engine.layout, _holding(holder))
    return with_run_adapter(holder, request)


def _holding(holder: DataHolder) -> requests.Holding:
    layout = holder.engine.layout
    return requests.Holding(
        plan_digest=holder.plan.digest,
        initial=lambda: holder.initial,  # made only where a request leaves a factor out
        base_delta=lambda digest: holder.base_deltas.held(digest, layout),
    )


FOR_FEDLLM: Mapping[str, Handler] = {
    "query.join": _join,
    "query.unmask": _unmask,
    "query.overlap": _overlap,
    "query.adapt": _adapt,
    "train": _train,
    "evaluate": _evaluate,
}
FOR_STOCK: Mapping[str, Handler] = {"train": train_for_stock, "evaluate": evaluate_for_stock}
