"""`fedllm registry`: list, show, add, promote, roll back, mark and verify versions of a model."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from fedllm.errors import ConfigError, IntegrityError
from fedllm.identity import load_key
from fedllm.registry.places import LOG
from fedllm.registry.registry import Registry, Version
from scripts.console import Console, shown_path

SHORT = 12  # letters of a digest that tell versions apart for a person


def open_registry(folder: Path) -> Registry:
    """Return the registry in a folder.

    Raises:
        ConfigError: there is none.
    """
    if not (folder / LOG).exists():
        raise ConfigError(f"{folder}: no registry; `fedllm registry add` makes one")
    return Registry(folder)


def list_versions(folder: Path, *, as_json: bool) -> None:
    """Print a line for each version."""
    versions = open_registry(folder).versions()
    if as_json:
        print(json.dumps([to_json(version) for version in versions]))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("version", "alias", "run", "clients", "epsilon", "gates", "from", "marked"):
        table.add_column(heading)
    number_of = {version.weights: str(version.number) for version in versions}
    for version in versions:
        said = version.statement
        parents = [number_of.get(each["digest"], each["digest"][:SHORT]) for each in said.parents]
        table.add_row(
            str(version.number),
            ", ".join(version.aliases),
            said.run.get("name", ""),
            str(said.clients.get("number", "")),
            "none" if said.epsilon is None else f"{said.epsilon:g}",
            f"{sum(bool(gate['passed']) for gate in said.gates.values())} of {len(said.gates)}"
            if said.gates
            else "none",
            ", ".join(parents),
            version.mark,
        )
    Console().rich.print(table)


def show(folder: Path, wanted: str, *, as_json: bool) -> None:
    """Print how a version came about, and what was made from it."""
    registry = open_registry(folder)
    version = registry.version(wanted)
    children = [child.number for child in registry.descendants(version.number)]
    if as_json:
        print(json.dumps({**to_json(version), "descendants": children}))
        return
    said = version.statement
    lines = {
        "aliases": ", ".join(version.aliases) or "none",
        "marked": version.mark,
        "digest": version.digest,
        "signed by": version.signer,
        "parents": ", ".join(f"{each['relation']} {each['digest'][:SHORT]}" for each in said.parents),
        "made from it": ", ".join(map(str, children)),
        **{name: _words(getattr(said, name)) for name in ("run", "base", "app", "clients", "consent")},
        "epsilon": "no guarantee" if said.epsilon is None else f"{said.epsilon:g}",
        "memorisation": _words(said.memorisation),
        "unlearning": _words(said.unlearning or {}),
    }
    console = Console()
    console.line(f"{registry.name}, version {version.number}: {shown_path(version.folder)}", style="bold")
    for name, text in lines.items():
        if text:
            console.line(f"  {name:<13} {text}")
    for name, gate in said.gates.items():
        passed = "passed" if gate["passed"] else "FAILED"
        console.line(f"  {'gate':<13} {name}: {gate['value']}, limit {gate['limit']}, {passed}")


def add(folder: Path, source: Path, key: Path, *, as_json: bool) -> None:
    """Sign an adapter and keep it as the next version."""
    _say(Registry(folder).add(source, load_key(key.expanduser())), "is signed and kept", as_json)


def promote(folder: Path, wanted: str, alias: str, *, as_json: bool) -> None:
    """Let an alias point to a version."""
    registry = open_registry(folder)
    version = registry.promote(registry.version(wanted).number, alias)
    _say(version, f"is {alias}", as_json)


def rollback(folder: Path, alias: str, *, as_json: bool) -> None:
    """Let an alias point to the version before."""
    _say(open_registry(folder).rollback(alias), f"is {alias} again", as_json)


def mark(folder: Path, wanted: str, reason: str, *, descendants: bool, as_json: bool) -> None:
    """Keep a version, and where asked what was made from it, from being promoted."""
    registry = open_registry(folder)
    first = registry.version(wanted).number
    numbers = [first, *(each.number for each in registry.descendants(first) if descendants)]
    marked = [registry.mark(number, reason) for number in numbers]
    if as_json:
        print(json.dumps([to_json(version) for version in marked]))
        return
    for version in marked:
        print(f"version {version.number} is marked and will not be promoted")
        for alias in version.aliases:
            print(f"  {alias} still points to it; `fedllm registry rollback --alias {alias}` moves it")


def verify(folder: Path, keys: list[str], head: str, *, as_json: bool) -> None:
    """Check a registry; exit 1 and name what was changed."""
    registry = open_registry(folder)
    try:
        found = asdict(registry.verify(keys, head))
    except IntegrityError as error:
        if as_json:
            print(json.dumps({"registry": str(folder), "intact": False, "reason": str(error)}))
        else:
            print(f"fedllm: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"registry": str(folder), "intact": True, **found}))
        return
    print(
        f"{registry.name}: {found['num_versions']} versions, {found['num_lines']} lines of log, none changed"
    )
    for signer in found["signers"]:
        print(f"  signed by {signer}" + ("" if keys else ", as the log says; --key names whom you trust"))
    for name in found["unfinished"]:
        print(f"  {name}: of a change that was interrupted; the next change mends it")
    print(f"  digest of the last line: {found['head']}; note it elsewhere for --head")


def to_json(version: Version) -> dict[str, Any]:
    """Return all that is known of a version, as values of JSON."""
    return {**asdict(version), "folder": str(version.folder)}


def _say(version: Version, what: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(version)))
    else:
        print(f"version {version.number} {what}: {shown_path(version.folder)}")


def _words(values: Any) -> str:
    """Return values by name as one line; of a list how many there are."""
    parts = {name: len(each) if isinstance(each, list) else each for name, each in values.items()}
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value not in ("", None))
