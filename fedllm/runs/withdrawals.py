"""The withdrawals that reached a run, and whose rows in a lineage they are about."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from fedllm.errors import ConfigError, IntegrityError
from fedllm.runs.folder import WITHDRAWALS
from fedllm.withdrawal import Withdrawal, read_withdrawal


def read_withdrawals(source: Path) -> list[Withdrawal]:
    """Return the withdrawals of a file, or of a run's folder, each checked.

    Raises:
        ConfigError: one cannot be read.
        IntegrityError: one is not signed by the site that it names.
    """
    found = []
    for file in sorted((source / WITHDRAWALS).glob("*.json")) if source.is_dir() else [source]:
        try:
            found.append(read_withdrawal(file.read_bytes()))
        except IntegrityError as error:
            raise IntegrityError(f"{file}: {error}") from None
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    return found


def withdrawn_of(clients: Mapping[str, Mapping[str, str]], records: Iterable[Withdrawal]) -> list[str]:
    """Return which clients of a lineage (`fedllm.runs.lineage.noted_clients`) have been withdrawn.

    A record of another key than a client's own says nothing of the client, whatever it names.
    """
    kept = list(records)
    return [name for name, one in clients.items() if any(each.covers(one["site"], name) for each in kept)]
