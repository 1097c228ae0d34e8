"""The state before round 1: the adapter that a run starts from, with its held-out losses."""

from pathlib import Path

from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import AdapterState
from fedllm.errors import ConfigError
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import START
from strategies.exchange.evaluation import evaluate_base
from strategies.session import Session


def first_state(session: Session, start: AdapterState | None = None) -> ServerState:
    """Return the state before round 1, with the held-out loss of its adapter as record 0.

    Without `start` that is the seeded initial adapter, which leaves the base model as it is.

    Raises:
        DivergedError: that loss is not finite, or the adapter to start from is too large to compute with.
    """
    state = ServerState(0, start or session.initial)
    return ServerState(0, state.adapter, records=(evaluate_base(session, state),))


def start_adapter(session: Session, folder: Path) -> AdapterState | None:
    """Return the adapter that was put into the folder of a run to start from, None where none was.

    Raises:
        IntegrityError: it is damaged.
        ConfigError: it has another layout than the run's.
    """
    place = folder / START
    if not place.exists():
        return None
    found = load_adapter(place).state
    if found.layout.digest != session.layout.digest:
        raise ConfigError(
            f"{place}: an adapter of another base model, rank or target modules; the run must have its keys"
        )
    session.watch.notice(f"starting from the adapter in {START}/")
    return found
