"""Who took part in a run, and whether it can be done again, as its log tells (`strategies.decisions`)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.chained_log import read_entries
from fedllm.errors import ConfigError
from fedllm.messages import JoinedClient


@dataclass(frozen=True)
class TookPart:
    """The clients that a run began with, whether there were others at any later time, and what code gave it.

    `given` names an adapter or a strategy that stand in no folder, so that nobody can do such a run again.
    """

    clients: Mapping[str, JoinedClient]
    has_changed: bool
    given: tuple[str, ...] = ()


def read_took_part(log: Path) -> TookPart:
    """Return who took part in a run, as its log tells.

    Raises:
        ConfigError: there is no such log, or it is damaged.
    """
    try:
        return _took_part(read_entries(log))
    except FileNotFoundError:
        raise ConfigError(
            f"{log}: missing, so nothing says who took part when; where the run has unlearnt by class D,"
            " unlearn from the run before it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{log}: cannot be read ({type(error).__name__}); restore it") from None


def _took_part(entries: Iterable[Mapping[str, Any]]) -> TookPart:
    """Return what the lines of a log tell."""
    starts: list[dict[str, JoinedClient]] = []
    has_begun = has_changed = False
    given: tuple[str, ...] = ()
    for entry in entries:
        if entry["event"] == "begun":
            starts.append({})
            has_begun = False
            given += tuple(entry.get("given", ()))
        elif entry["event"] == "round":
            has_begun = True
        elif entry["event"] == "joined":
            fields = {name: entry[name] for name in ("num_train", "num_held_out", "fingerprint", "site")}
            client = JoinedClient(client_id=entry["client"], node_id=entry["node"], **fields)
            has_changed |= has_begun and not _is_same(starts[-1].get(client.client_id), client)
            starts[-1][client.client_id] = client
    first, *later = [start for start in starts if start] or [{}]  # without those that nobody joined
    for start in later:
        has_changed |= start.keys() != first.keys()
        has_changed |= any(not _is_same(first.get(name), client) for name, client in start.items())
    return TookPart(first, has_changed, given)


def _is_same(before: JoinedClient | None, now: JoinedClient) -> bool:
    """Return whether a client is back as it was; a node that was started again may have another id."""
    return before is not None and replace(before, node_id=now.node_id) == now
