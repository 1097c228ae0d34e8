"""How an adapter came about: what a run notes of it, and the statement that can then be signed.

`lineage.json` in the run folder has what only the run itself knows: who took part, noted as they join, and
when it ends the digests of its base model and code. All else is read from the folder's other files when the
adapter is signed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.adapters.folder import WEIGHTS, load_adapter
from fedllm.errors import ConfigError, ModelError
from fedllm.files import verify_manifest, write_file
from fedllm.models.files import ModelFiles, content_digest, fingerprint, name_to_resolve, resolve_model
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.folder import RESULT, START
from fedllm.runs.memorisation import read_memorisation
from fedllm.runs.unlearning import UNLEARNING
from fedllm.siblings import ROOT
from fedllm.signing.statement import AdapterStatement

LINEAGE = "lineage.json"
RETRAINED, UNLEARNED = "retrained-from", "unlearned-from"  # how an adapter came from a parent
_SHIPPED = ("fedllm", "clients", "strategies")  # packages that compute with a run's text


def noted_clients(folder: Path) -> dict[str, dict[str, str]]:
    """Return what `note_clients` has noted in a run's folder.

    Raises:
        ConfigError: the file is damaged.
    """
    return dict(_lineage(folder).get("consent", {}).get("clients", {}))


def note_clients(folder: Path, clients: Mapping[str, Mapping[str, str]]) -> None:
    """Add clients to `lineage.json`: who has left by the end, or before a resume, took part all the same.

    Each has its "site", a salted "commitment" to its rows and the digest of the site's "consent".

    Raises:
        ConfigError: the file is damaged.
        OSError: it cannot be written.
    """
    lineage, noted = _lineage(folder), noted_clients(folder)
    if clients.items() <= noted.items():  # as in most rounds, in which nobody is new
        return
    consent = {**lineage.get("consent", {}), "clients": dict(sorted({**noted, **clients}.items()))}
    _write(folder, {**lineage, "consent": consent})


def write_lineage(
    folder: Path, plan: RunPlan, files: ModelFiles, *, num_clients: int, bundle: str = ""
) -> None:
    """Complete `lineage.json` of a run that has ended; `bundle` is the digest of the code Flower shipped."""
    lineage = {
        "run": {"name": plan.config.run.name, "plan": plan.digest},
        "base": _base(files),
        "app": {"source": source_digest(), "bundle": bundle},
        "num_clients": num_clients,
        "consent": {"purpose": plan.config.run.purpose, "clients": noted_clients(folder)},
    }
    _write(folder, lineage)


def statement_of_run(folder: Path) -> AdapterStatement:
    """Return what can be said of the adapter of a finished run, unsigned and without a version.

    Names of clients are not in it.

    Raises:
        ConfigError: the run is not finished, or a file of it is missing or damaged.
        IntegrityError: a file of the adapter was changed since it was published.
    """
    result = _read(folder / RESULT)
    if result.get("status") != "completed":
        raise ConfigError(f"{folder}: not a finished run; go on with --resume, then sign")
    verify_manifest(folder / "adapter")
    lineage = _read(folder / LINEAGE)
    privacy, unlearning = (
        _read(folder / name) if (folder / name).exists() else None for name in ("privacy.json", UNLEARNING)
    )
    try:
        config = hashlib.sha256((folder / "config.toml").read_bytes()).hexdigest()
        consent = lineage["consent"]
        clients = consent["clients"].values()
        return AdapterStatement(
            name=lineage["run"]["name"],
            run={**lineage["run"], "config": config},
            parents=_parents(folder, unlearning),
            base=lineage["base"],
            app={"version": _read(folder / "environment.json")["fedllm"], **lineage["app"]},
            clients={"number": lineage["num_clients"], "commitments": _told(clients, "commitment")},
            privacy=privacy,
            consent={"purpose": consent["purpose"], "consents": _told(clients, "consent")},
            memorisation=read_memorisation(folder),
            unlearning=unlearning,
        )
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: its lineage is damaged ({type(error).__name__}); restore it") from None


def statement_of_adapter(folder: Path, base: str = "") -> AdapterStatement:
    """Return what can be said of an adapter folder without its run: its name and base model.

    `base` names the base model on this machine, where the adapter's own name for it does not.

    Raises:
        ModelError: that model is not on this machine, or is another one.
        IntegrityError: the folder was changed since it was written.
    """
    published = load_adapter(folder, made_here=True)
    files = resolve_model(base or name_to_resolve(published.base_model, published.revision))
    if fingerprint(files.folder) != published.state.layout.fingerprint:
        raise ModelError(f"{folder}: trained on another base model than {files.public_name} on this machine")
    named = {"name": published.base_model, "revision": published.revision}
    return AdapterStatement(name=folder.resolve().name, base={**_base(files), **named})


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of an adapter's weights, by which a statement names a parent.

    Copies of one adapter may be signed apart, in its run and in a registry; their weights are the same.

    Raises:
        OSError: there are no weights.
    """
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _base(files: ModelFiles) -> dict[str, str]:
    return {"name": files.public_name, "revision": files.revision, "digest": content_digest(files.folder)}


def source_digest() -> str:
    """Return the SHA-256 (hex) of this code: the same wherever it runs, shipped by Flower or installed."""
    files = [file for package in _SHIPPED for file in (ROOT / package).rglob("*.py")]
    sources = {
        file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


def _parents(folder: Path, unlearning: Mapping[str, Any] | None) -> tuple[dict[str, str], ...]:
    parents = []
    if (folder / START).is_dir():
        parents.append({"relation": RETRAINED, "digest": adapter_digest(folder / START)})
    if unlearning is not None:
        parents.append({"relation": UNLEARNED, "digest": str(unlearning["parent"])})
    return tuple(parents)


def _lineage(folder: Path) -> dict[str, Any]:
    return _read(folder / LINEAGE) if (folder / LINEAGE).exists() else {}


def _write(folder: Path, lineage: Mapping[str, Any]) -> None:
    write_file(folder / LINEAGE, json.dumps(lineage, indent=1) + "\n")


def _told(clients: Any, name: str) -> list[str]:
    """Return what clients told, sorted: the order is not to say whose it is."""
    return sorted(client[name] for client in clients if client.get(name))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: damaged; restore it")
    return found
