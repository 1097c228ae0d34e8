"""What a node answers: message to values, values to message, and no text of an exception in between."""

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.data_holder import DataHolder
from clients.evaluate import evaluate_clients
from clients.gate import Question, Sender, admit, admit_work, note
from clients.join import declare_clients
from clients.kinds import kind_of, make_app
from clients.originality import answer_overlap, check_limit
from clients.process import Process
from clients.protect import node_mean
from clients.stock import evaluate_for_stock, train_for_stock
from clients.train import train_clients
from fedllm.errors import FedLLMError
from fedllm.messages import ClientUpdate
from fedllm.wire import overlaps, packets, replies, requests

_logger = logging.getLogger("fedllm.clients")

UNKNOWN = Sender()
Handler: TypeAlias = Callable[[DataHolder, RecordDict, Context], RecordDict]


def make_client_app(process: Process) -> ClientApp:
    """Return a ClientApp that answers here and keeps what it has opened in `process`."""
    return make_app(partial(answer, process))


def answer(process: Process, message: Message, context: Context, sender: Sender = UNKNOWN) -> Message:
    """Return the reply of this node, or one that holds an error code and nothing else.

    Training and evaluation also answer a stock Flower strategy, for the node as a whole. `sender` is who asks
    as far as the site itself knows.
    """
    kind = kind_of(message)
    question = Question(
        action=kind.removeprefix("query."),
        content=message.content,
        run_config=context.run_config,
        node_config=context.node_config,
        is_stock=kind in _FOR_STOCK and not requests.is_fedllm_request(message.content),
        sender=sender,
    )
    handler = _FOR_STOCK[kind] if question.is_stock else _FOR_FEDLLM[kind]
    began = time.monotonic()
    code, content = _answer(process, handler, question, context)
    try:
        note(question, code, content, time.monotonic() - began)
    except FedLLMError as error:  # what is not in the log does not leave
        if error.code != code:  # else it has been told already
            _logger.error("%s: %s", error.code, error)
        code, content = error.code, None
    if content is not None:
        return Message(content, reply_to=message)
    if question.is_stock:  # stock strategies drop error messages and abort on anything else
        return Message(Error(code=0, reason=code), reply_to=message)
    return Message(replies.write_error(code), reply_to=message)


def _join(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    return replies.write_joined(declare_clients(holder, context.node_id))


def _train(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    plan, layout = holder.plan, holder.engine.layout
    request = requests.read_train_request(content, layout, _holding(holder))
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


def _evaluate(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    request = requests.read_evaluate_request(content, holder.engine.layout, _holding(holder))
    return replies.write_evaluations(evaluate_clients(holder, request))


def _overlap(holder: DataHolder, content: RecordDict, context: Context) -> RecordDict:
    request = overlaps.read_overlap_request(content)
    # Flower keeps a node's state for the length of a run, even where every message has a new process.
    last = context.state.config_records.get("overlap", ConfigRecord({"round": 0}))
    check_limit(request, packets.scalar_field(last, "round", int), holder.plan.config.federation.num_rounds)
    # Counted before it is answered: a query that fails half-way may have told something.
    context.state["overlap"] = ConfigRecord({"round": request.round_num})
    return overlaps.write_overlaps(answer_overlap(holder, request))


def _holding(holder: DataHolder) -> requests.Holding:
    layout = holder.engine.layout
    return requests.Holding(
        plan_digest=holder.plan.digest,
        initial=lambda: holder.initial,  # made only where a request leaves a factor out
        base_delta=lambda digest: holder.base_deltas.held(digest, layout),
    )


_FOR_FEDLLM: Mapping[str, Handler] = {
    "query.join": _join,
    "query.overlap": _overlap,
    "train": _train,
    "evaluate": _evaluate,
}
_FOR_STOCK: Mapping[str, Handler] = {"train": train_for_stock, "evaluate": evaluate_for_stock}


def _answer(
    process: Process, handler: Handler, question: Question, context: Context
) -> tuple[str, RecordDict | None]:
    """Return "ok" and the handler's reply to an admitted question, or an error code and None.

    Flower would send the text of an exception to the server, and that text may quote a row. So the one broad
    `except` of this project stands here: the cause is logged on this machine, where the row already is, and
    even there without the exception's own words. A panic of Rust code, as of a tokenizer, is no `Exception`:
    it would end the process with a traceback that quotes the row, and leave the server without an answer.
    """
    try:
        admit(question)
        holder = process.open(context.run_config, context.node_config)
        admit_work(question, holder)
        content = handler(holder, question.content, context)
        if holder.plan.distillation is not None:  # the server will compute too, in a simulation on this GPU
            torch.cuda.empty_cache()
        return "ok", content
    except FedLLMError as error:
        _logger.error("%s: %s", error.code, error)  # the code is what the server is told
        return error.code, None
    except (KeyboardInterrupt, SystemExit):  # the machine's own wish to end
        raise
    except BaseException as error:
        if _is_out_of_memory(error):
            _logger.error("out-of-memory: lower train.batch-size or train.max-length")
            return "out-of-memory", None
        frame = traceback.extract_tb(error.__traceback__)[-1]  # where it happened quotes no row
        _logger.error("internal: unforeseen %s at %s:%s", type(error).__name__, frame.filename, frame.lineno)
        return "internal", None


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was short, a GPU's or this machine's, for which torch has no error of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
