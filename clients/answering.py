"""What a node answers: message to values, values to message, and no text of an exception in between."""

import logging
import time
import traceback
from functools import partial

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.gate import Question, Sender, admit, admit_work, in_time, note
from clients.handlers import FOR_FEDLLM, FOR_STOCK, Handler
from clients.kinds import kind_of, make_app
from clients.process import Process
from fedllm.errors import FedLLMError, WithdrawnError
from fedllm.wire.refusals import is_stock, refusal, write_withdrawn

_logger = logging.getLogger("fedllm.clients")

UNKNOWN = Sender()


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
        is_stock=is_stock(message),
        sender=sender,
    )
    handler = (FOR_STOCK if question.is_stock else FOR_FEDLLM)[kind]
    began = time.monotonic()
    code, content = _answer(process, handler, question, context)
    try:
        note(question, code, content, time.monotonic() - began)
    except FedLLMError as error:  # what is not in the log does not leave
        if error.code != code:  # else it has been told already
            _logger.error("%s: %s", error.code, error)
        code, content = error.code, None
    return refusal(message, code) if content is None else Message(content, reply_to=message)


def _answer(
    process: Process, handler: Handler, question: Question, context: Context
) -> tuple[str, RecordDict | None]:
    """Return "ok" and the handler's reply to an admitted question, or an error code and None.

    A site that has withdrawn sends its signed record with the code: the server can then prove it to others.

    Flower would send the text of an exception to the server, and that text may quote a row. So the one broad
    `except` of this project stands here: the cause is logged on this machine, where the row already is, and
    even there without the exception's own words. A panic of Rust code, as of a tokenizer, is no `Exception`:
    it would end the process with a traceback that quotes the row, and leave the server without an answer.
    """
    try:
        admit(question)
        holder = process.open(context.run_config, context.node_config)
        admit_work(question, holder)
        with in_time(question):
            content = handler(holder, question.content, context)
        if holder.plan.distillation is not None:  # the server will compute too, in a simulation on this GPU
            torch.cuda.empty_cache()
        return "ok", content
    except WithdrawnError as error:
        _logger.error("%s: %s", error.code, error)
        return error.code, None if question.is_stock else write_withdrawn(error.record)
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
