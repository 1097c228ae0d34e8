"""`fedllm registry withdraw`: the server marks what was made with the rows of sites that have withdrawn."""

from collections.abc import Iterable
from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.registry.registry import WITHDRAWN, Registry, Version, inherits
from fedllm.runs.withdrawals import read_withdrawals, withdrawn_of
from fedllm.withdrawal import Withdrawal
from scripts.console import Console


def withdraw(registry: Path, source: Path) -> None:
    """Mark the versions of a registry, and print them; `source` is a record, or a run that was sent some.

    Raises:
        ConfigError: there is no record, or no registry.
        IntegrityError: a record is not signed by the site that it names.
    """
    if not registry.is_dir():
        raise ConfigError(f"{registry}: no registry; name the folder of one model's versions")
    console, versions = Console(), Registry(registry)
    if not (records := read_withdrawals(source)):
        raise ConfigError(f"{source}: no withdrawal has reached this run")
    marked = mark_withdrawn(versions, records)
    for version in marked:
        used = f"; {', '.join(version.aliases)} still points to it: fedllm registry rollback"
        console.line(f"version {version.number} is marked, never promoted{used if version.aliases else ''}")
    if not marked:
        console.line(f"no version of {versions.name} was made with those clients' rows under that site's key")


def mark_withdrawn(registry: Registry, withdrawals: Iterable[Withdrawal]) -> list[Version]:
    """Mark every version that a withdrawn client took part in, and what was made from one; return them.

    A version that has unlearnt a client exactly owes nothing of it to the version that it was unlearnt from,
    but may to one that it was retrained from. Marking again adds nothing.
    """
    records, family, marked = list(withdrawals), set[str](), []
    for version in registry.versions():  # the oldest first: a parent comes before what was made from it
        clients = registry.lineage(version.number).get("consent", {}).get("clients", {})
        if withdrawn_of(clients, records) or inherits(version.statement, family):
            family.add(version.weights)
            marked.append(version if version.mark else registry.mark(version.number, WITHDRAWN))
    return marked
