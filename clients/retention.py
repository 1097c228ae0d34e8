"""How long a site keeps what its clients have learnt: `[site] keep-days` after a run last changed it.

    NAME-DIGEST/CLIENT/*.safetensors, home/   personal adapters and other vectors, adapters trained at home
    secure/NAME-DIGEST/CLIENT/                the keys of secret sums, and each client's copy of the adapter

These are removed. Ledgers, secrets of noise and what was masked under which label stay, as do the site's log
and counts: a server that asks again under the same name must find neither a fresh budget nor a fresh mask.
The code that servers ship is never written to a site's disk, so there is none to remove.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from clients.asked import SECONDS_A_DAY
from clients.home_folder import HOME
from clients.run_keys import KEYS, SECURE

_RUN = f"*-{'[0-9a-f]' * 16}"  # nothing else that an owner may keep below the state folder, such as a model


def remove_ended(state: Path, days: float, now: float) -> list[str]:
    """Remove what runs have left below a state folder, where nothing of a run changed for so many days.

    `now` is in seconds since 1970. Returns the folders, below `state`, that all of it is removed from.

    Raises:
        OSError: a folder cannot be read.
    """
    removed = []
    for folder, private in _runs(state):
        changed = max((_changed(path) for path in (folder, *folder.rglob("*"))), default=now)
        if private and changed < now - days * SECONDS_A_DAY:
            for path in private:
                _remove(path)
            if not any(path.exists() for path in private):
                removed.append(str(folder.relative_to(state)))
    return removed


def _runs(state: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each run's folder with what is to be removed of it once the run has ended."""
    for folder in sorted((*state.glob(_RUN), *(state / SECURE).glob(_RUN))):
        own = HOME, *(KEYS if folder.parent.name == SECURE else ())
        yield (
            folder,
            [*folder.glob("*/*.safetensors"), *(path for path in folder.glob("*/*") if path.name in own)],
        )


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # replaced by a newer one meanwhile
        return float("inf")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # the next look finds it again
            path.unlink()
