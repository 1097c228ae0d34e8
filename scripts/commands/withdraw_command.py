"""`fedllm registry withdraw`: the server marks what was made with the rows of sites that have withdrawn."""

from collections.abc import Iterable
from pathlib import Path

from fedllm.errors import ConfigError, IntegrityError
from fedllm.registry.registry import Registry, Version
from fedllm.runs.folder import WITHDRAWALS
from fedllm.withdrawal import Withdrawal, read_withdrawal
from scripts.console import Console

REASON = "made with the rows of a site that has withdrawn"  # no name: a registry is shown to others
EXACT = frozenset("AC")  # classes of unlearning after which nothing of the client is left (unlearning.md)


def withdraw(registry: Path, source: Path) -> None:
    """Mark the versions of a registry, and print them; `source` is a record, or a run that was sent some.

    Raises:
        ConfigError: there is no record, or no registry.
        IntegrityError: a record is not signed by the site that it names.
    """
    if not registry.is_dir():
        raise ConfigError(f"{registry}: no registry; name the folder of one model's versions")
    console, versions = Console(), Registry(registry)
    marked = mark_withdrawn(versions, read_withdrawals(source))
    for version in marked:
        used = f"; {', '.join(version.aliases)} still points to it: fedllm registry rollback"
        console.line(f"version {version.number} is marked, never promoted{used if version.aliases else ''}")
    if not marked:
        console.line(f"no version of {versions.name} was made with those clients' rows under that site's key")


def read_withdrawals(source: Path) -> list[Withdrawal]:
    """Return the withdrawals of a file, or of a run's folder, each checked.

    Raises:
        ConfigError: there is none.
        IntegrityError: one is not signed by the site that it names.
    """
    files = sorted((source / WITHDRAWALS).glob("*.json")) if source.is_dir() else [source]
    if not files:
        raise ConfigError(f"{source}: no withdrawal has reached this run")
    found = []
    for file in files:
        try:
            found.append(read_withdrawal(file.read_bytes()))
        except IntegrityError as error:
            raise IntegrityError(f"{file}: {error}") from None
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    return found


def mark_withdrawn(registry: Registry, withdrawals: Iterable[Withdrawal]) -> list[Version]:
    """Mark every version that a withdrawn client took part in, and what was made from one; return them.

    A version that has unlearnt the client exactly keeps its place: it has the bits of a run without it.
    Marking again adds nothing.
    """
    records, family, marked = list(withdrawals), frozenset[str](), []
    for version in registry.versions():  # the oldest first: a parent comes before what was made from it
        clients = registry.lineage(version.number).get("consent", {}).get("clients", {})
        took_part = any(
            record.covers(client["site"], name) for record in records for name, client in clients.items()
        )
        unlearning = version.statement.unlearning
        is_free = unlearning is not None and unlearning["class"] in EXACT
        inherits = not is_free and family & {parent["digest"] for parent in version.statement.parents}
        if took_part or inherits:
            family |= version.names
            marked.append(version if version.mark else registry.mark(version.number, REASON))
    return marked
