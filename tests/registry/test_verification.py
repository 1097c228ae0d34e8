"""Whatever is changed in a registry is found and named; what a kill may leave is no fault."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import IntegrityError
from fedllm.files import SIGNATURE
from fedllm.identity import public_text
from fedllm.registry import verification
from fedllm.registry.registry import Registry
from fedllm.registry.verification import check_version
from tests.registry.conftest import KEY


def flip(file: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def test_a_change_meanwhile_is_no_fault(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.note("drift")  # so that no alias may be one line behind
    checked: list[int] = []

    def check(folder: Path, number: int, *known: Any) -> None:
        check_version(folder, number, *known)
        checked.append(number)
        if checked == [1, 2]:
            registry.rollback()

    monkeypatch.setattr(verification, "check_version", check)
    assert registry.verify().num_lines == 6
    assert checked == [1, 2, 1, 2]


def test_an_intact_registry_says_what_it_holds(registry: Registry) -> None:
    check = registry.verify([public_text(KEY)])
    assert (check.num_versions, check.num_lines, check.signers) == (2, 4, (public_text(KEY),))
    assert check.unfinished == ()
    registry.note("drift")
    assert registry.verify(head=check.head).num_lines == 5


def test_a_changed_byte_of_any_file_is_named(registry: Registry) -> None:
    files = [file for file in registry.folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    assert len(files) > 12
    for file in files:
        content = file.read_bytes()
        for place in {0, len(content) // 2, len(content) - 2}:
            flip(file, place)
            named = "log.jsonl" if file.name == "head" else file.name
            with pytest.raises(IntegrityError, match=named):
                registry.verify()
            file.write_bytes(content)
    registry.verify()


@pytest.mark.parametrize("line", range(4))
def test_a_changed_entry_of_the_log_is_found(registry: Registry, line: int) -> None:
    log = registry.folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    lines[line] = lines[line].replace('"version": ', '"version": 1')
    log.write_text("".join(lines))
    with pytest.raises(IntegrityError, match=r"log\.jsonl: (line|no line)"):
        registry.verify()
    with pytest.raises(IntegrityError, match=r"log\.jsonl"):
        registry.versions()


@pytest.mark.parametrize("kept", range(4))
def test_a_log_cut_from_its_end_is_found(registry: Registry, kept: int) -> None:
    log = registry.folder / "log.jsonl"
    noted = registry.verify().head
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:kept]))
    with pytest.raises(IntegrityError, match="lines were cut from its end or replaced"):
        registry.verify()
    (registry.folder / "head").unlink()  # who cuts the log may also remove what stands beside it
    with pytest.raises(IntegrityError):
        registry.verify(head=noted)


def exchange_versions(registry: Registry) -> None:
    first, second = (registry.version(number).folder for number in (1, 2))
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)


def exchange_statements(registry: Registry) -> None:
    first, second = (registry.version(number).folder / SIGNATURE for number in (1, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def sign_anew(registry: Registry) -> None:
    file = registry.version(1).folder / SIGNATURE
    envelope = json.loads(file.read_bytes())
    payload = base64.b64decode(envelope["payload"]).replace(b'"passed":true', b'"passed":null')
    file.write_bytes(json.dumps({**envelope, "payload": base64.b64encode(payload).decode()}).encode())


CHANGES: dict[str, tuple[Callable[[Registry], object], str]] = {
    "exchanged versions": (exchange_versions, rf"0001/{SIGNATURE}: not the signature that .*log\.jsonl has"),
    "exchanged statements": (exchange_statements, rf"0001/{SIGNATURE}: not the signature"),
    "a changed statement": (sign_anew, rf"0001/{SIGNATURE}: not the signature"),
    "a missing version": (lambda r: shutil.rmtree(r.version(2).folder), rf"0002/{SIGNATURE}: cannot be read"),
    "a missing file": (lambda r: (r.version(2).folder / "README.md").unlink(), r"0002/README\.md: missing"),
    "a file more": (lambda r: (r.version(2).folder / "x.bin").touch(), r"0002/x\.bin: not listed"),
    "a folder more": (lambda r: (r.folder / "0009").mkdir(), r"0009: not a part of this registry"),
    "a moved alias": (
        lambda r: (r.folder / "aliases" / "production").write_text("0001\n"),
        "aliases/production: says '0001', and the log says 0002",
    ),
    "an alias more": (
        lambda r: (r.folder / "aliases" / "next").write_text("0001\n"),
        "aliases/next: says '0001', and the log says no such alias",
    ),
    "other lineage": (
        lambda r: (r.folder / "lineage" / "0001.json").write_text("{}"),
        r"0001\.json: not the lineage",
    ),
    "no head": (lambda r: (r.folder / "head").unlink(), "head: missing"),
    "no log": (lambda r: (r.folder / "log.jsonl").unlink(), r"log\.jsonl: cannot be read"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_exchanged_added_or_removed_is_named(registry: Registry, change: str) -> None:
    if "alias" in change:
        registry.note("drift")  # right after a promotion the alias may be one line behind
    make, named = CHANGES[change]
    make(registry)
    with pytest.raises(IntegrityError, match=named):
        registry.verify()


def test_a_signer_who_is_not_trusted_is_named(registry: Registry) -> None:
    other = public_text(Ed25519PrivateKey.from_private_bytes(bytes(32)))
    with pytest.raises(IntegrityError, match="none of the trusted keys"):
        registry.verify([other])
    registry.verify([other, public_text(KEY)])


def test_versions_of_another_model_are_refused(registry: Registry) -> None:
    renamed = registry.folder.rename(registry.folder.with_name("other"))
    with pytest.raises(IntegrityError, match="signed as version 1 of clinic"):
        Registry(renamed).verify()
