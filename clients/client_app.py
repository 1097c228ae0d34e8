"""The Flower ClientApp: message to values, values to message, and no text of an exception in between."""

import logging
import traceback
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.base_deltas import base_delta_store
from clients.data_holder import DataHolder, open_data_holder
from clients.evaluate import evaluate_clients
from clients.join import declare_clients
from clients.originality import answer_overlap, check_limit
from clients.protect import node_mean
from clients.stock import evaluate_for_stock, train_for_stock
from clients.train import train_clients
from fedllm.errors import FedLLMError
from fedllm.messages import ClientUpdate
from fedllm.wire import overlaps, packets, replies, requests

app = ClientApp()
_logger = logging.getLogger("fedllm.clients")

Handler: TypeAlias = Callable[[DataHolder, RecordDict, int], RecordDict]


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Declare this node's clients."""
    return _answer(message, context, _join)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients a request names; a stock Flower strategy's request trains the whole node."""
    ours = requests.is_fedllm_request(message.content)
    return _answer(message, context, _train if ours else train_for_stock, is_stock=not ours)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the held-out loss of the clients a request names, or of the whole node."""
    ours = requests.is_fedllm_request(message.content)
    return _answer(message, context, _evaluate if ours else evaluate_for_stock, is_stock=not ours)


@app.query("overlap")
def overlap(message: Message, context: Context) -> Message:
    """Count how much of the server's synthetic texts occurs in this node's private text."""
    return _answer(message, context, partial(_overlap, context.state))


def _join(holder: DataHolder, content: RecordDict, node_id: int) -> RecordDict:
    return replies.write_joined(declare_clients(holder, node_id))


def _train(holder: DataHolder, content: RecordDict, node_id: int) -> RecordDict:
    layout = holder.engine.layout
    request = requests.read_train_request(content, layout, _holding(holder))
    answers = train_clients(holder, request)
    if request.node_sum:
        mean_P = node_mean([answer for answer in answers if isinstance(answer, ClientUpdate)])
        return replies.write_sum(answers, mean_P, layout=layout, part=request.returned, payload=request.codec)
    return replies.write_updates(answers, layout=layout, part=request.returned, payload=request.codec)


def _evaluate(holder: DataHolder, content: RecordDict, node_id: int) -> RecordDict:
    request = requests.read_evaluate_request(content, holder.engine.layout, _holding(holder))
    return replies.write_evaluations(evaluate_clients(holder, request))


def _overlap(state: RecordDict, holder: DataHolder, content: RecordDict, node_id: int) -> RecordDict:
    request = overlaps.read_overlap_request(content)
    # Flower keeps a node's state for the length of a run, even where every message has a new process.
    last = state.config_records.get("overlap", ConfigRecord({"round": 0}))
    check_limit(request, packets.scalar_field(last, "round", int), holder.plan.config.federation.num_rounds)
    state["overlap"] = ConfigRecord({"round": request.round_num})
    return overlaps.write_overlaps(answer_overlap(holder, request))


def _holding(holder: DataHolder) -> requests.Holding:
    layout = holder.engine.layout
    return requests.Holding(
        initial=lambda: holder.initial, base_delta=lambda digest: base_delta_store().held(digest, layout)
    )


def _answer(message: Message, context: Context, handler: Handler, *, is_stock: bool = False) -> Message:
    """Return the handler's reply, or a reply that holds an error code and nothing else.

    Flower would send the text of an exception to the server, and that text may quote a row. So the one broad
    `except` of this project stands here: the cause is logged on this machine, where the row already is, and
    even there without the exception's own words.
    """
    try:
        holder = open_data_holder(context.run_config, context.node_config)
        return Message(handler(holder, message.content, context.node_id), reply_to=message)
    except FedLLMError as error:
        _logger.error("%s", error)
        code = error.code
    except (MemoryError, torch.OutOfMemoryError):
        _logger.error("out of memory: lower train.batch-size or train.max-length")
        code = "out-of-memory"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        _logger.error("internal error: %s at %s:%s", type(error).__name__, frame.filename, frame.lineno)
        code = "internal"
    if is_stock:  # stock strategies drop error messages and abort on anything else
        return Message(Error(code=0, reason=code), reply_to=message)
    return Message(replies.write_error(code), reply_to=message)
