"""The engine on which the server distils: the base model is opened when a step is due and not before."""

from fedllm.engine.engine import Engine, resident_engine
from fedllm.models.base import load_base
from strategies.session import Session


def open_engine(session: Session) -> Engine:
    """Return the engine on this process's base model; in a local run it is that of the clients.

    Raises:
        ModelError, LayoutError: this machine has no such base model.
    """
    config = session.config
    return resident_engine(load_base(config.model), session.layout, config.train.token_budget)
