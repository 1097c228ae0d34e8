"""`fedllm sign` and `fedllm verify`: a signed statement on an adapter, and whether it holds."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fedllm.errors import CheckpointError, ConfigError
from fedllm.identity import is_public_text, load_key, public_text
from fedllm.runs.lineage import statement_of_adapter, statement_of_run
from fedllm.signing.statement import AdapterStatement, sign_adapter, signature_digest, signed_by
from fedllm.signing.trust import check_trusted
from fedllm.site_policy import load_policy
from scripts.console import Console, shown_path
from scripts.finished_run import find_adapter


def sign(target: Path, *, key: Path, name: str, version: int, base: str, as_json: bool) -> None:
    """Write `adapter.sig.json` into the folder of an adapter, in place of an earlier one.

    Raises:
        ConfigError: there is no finished run and no adapter, or the key cannot be used.
        IntegrityError: a file of the adapter was changed since it was written.
        FedLLMError: the base model is not on this machine, or the disk does not take the signature.
    """
    folder, config = find_adapter(target)
    signer = load_key(key.expanduser())
    statement = statement_of_adapter(folder, base) if config is None else statement_of_run(folder.parent)
    named = replace(statement, name=name or statement.name, version=version)
    try:
        signed = sign_adapter(folder, named, signer)
    except OSError as error:
        raise CheckpointError(f"{folder}: the signature cannot be written ({error.strerror})") from None
    _tell(folder, signed, public_text(signer), as_json)


def verify(target: Path, *, keys: Sequence[str], as_json: bool) -> None:
    """Check an adapter against public keys, else against this machine's policy, and print its statement.

    Raises:
        ConfigError: there is no adapter, or no key to check it by.
        IntegrityError: the signature is not by one of the keys, or a file is missing, extra or changed.
        PolicyError: no keys are given, and the adapter is unsigned or older than the policy asks for.
    """
    folder, _ = find_adapter(target)
    if wrong := next((key for key in keys if not is_public_text(key)), None):
        raise ConfigError(
            f"--key {wrong}: expected a public key, 'ed25519:...', as `fedllm keys show` prints it"
        )
    trusted = keys or load_policy().adapters.signers
    if not trusted:
        raise ConfigError("whose signature? Name a public key with --key, or [adapters] signers in site.toml")
    if not keys:
        check_trusted(folder)
    _tell(folder, *signed_by(folder, trusted), as_json)


def _tell(folder: Path, statement: AdapterStatement, signer: str, as_json: bool) -> None:
    digest = signature_digest(folder)
    if as_json:
        print(json.dumps({"signer": signer, "digest": digest, "statement": asdict(statement)}))
        return
    console = Console()
    console.line(f"{shown_path(folder)}: {len(statement.files)} files, signed by {signer}")
    for label, text in _facts(statement):
        console.line(f"  {label}: {text}")
    console.line(f"  digest of the signature: {digest}")


def _facts(statement: AdapterStatement) -> Iterator[tuple[str, str]]:
    """Yield what a statement says, in short, without what it leaves open."""
    version = f", version {statement.version}" if statement.version else ""
    yield "adapter", f"{statement.name}{version}"
    for parent in statement.parents:
        yield parent["relation"].replace("-", " "), parent["digest"]
    if statement.base:
        yield "base model", f"{statement.base['name']}, sha256:{statement.base['digest']}"
    if statement.app:
        yield "code", f"fedllm {statement.app['version']}, source {statement.app['source']}"
    if statement.clients:
        commitments = len(statement.clients["commitments"])
        yield "clients", f"{statement.clients['number']} trained, {commitments} commitments to rows"
    epsilon = "none is claimed" if statement.epsilon is None else f"epsilon {statement.epsilon:g}"
    yield "differential privacy", epsilon
    if purpose := statement.consent.get("purpose"):
        yield "purpose", str(purpose)
    for name, gate in statement.gates.items():
        yield f"gate {name}", f"{'passed' if gate['passed'] else 'failed'} ({gate['value']}, {gate['limit']})"
    if statement.unlearning is not None:
        yield "unlearning", json.dumps(statement.unlearning)
