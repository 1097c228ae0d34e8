"""The kinds of message that a node answers, and the Flower app that passes them on."""

from collections.abc import Callable
from typing import TypeAlias

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

KINDS = ("query.join", "query.unmask", "query.overlap", "query.adapt", "train", "evaluate")
Answer: TypeAlias = Callable[[Message, Context], Message]


def make_app(answer: Answer) -> ClientApp:
    """Return a ClientApp that gives every kind of message that a node answers to `answer`."""
    app = ClientApp()
    for action in ("join", "unmask", "overlap", "adapt"):
        app.query(action)(answer)
    app.train()(answer)
    app.evaluate()(answer)
    return app


def kind_of(message: Message) -> str:
    """Return which of `KINDS` a message is; Flower's app refuses all others."""
    return message.metadata.message_type.removesuffix(".default")
