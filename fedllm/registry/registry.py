"""A folder of signed versions of one model, a log of what happened to them, and aliases such as "production".

registry/NAME/0007/               an adapter folder with its signed statement (fedllm/signing/)
registry/NAME/log.jsonl           every change, chained by hash (history.py); it decides
registry/NAME/head                the digest of the log's last line, so that a change of it is found too
registry/NAME/aliases/production  the folder in use, such as `0007`, for programs that deploy it
registry/NAME/lineage/0007.json   what the run knew of its clients; never part of the version

Every change is one line of the log. A version's files are complete before its line is written, and an alias
changes after its line. So a process that is killed leaves either no change, or a line whose alias the next
change brings up to date; the same change asked for again is made once.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm import chained_log
from fedllm.adapters.folder import WEIGHTS, load_adapter
from fedllm.errors import ConfigError, FedLLMError
from fedllm.files import (
    SIGNATURE,
    complete_folder,
    file_digests,
    locked,
    refuse_difference,
    remove_unfinished,
    write_bytes,
    write_file,
    write_manifest,
)
from fedllm.identity import public_text
from fedllm.registry.history import ADDED, EVENTS, MARKED, PROMOTED, ROLLED_BACK, History
from fedllm.registry.places import ALIASES, HEAD, LINEAGE, LOCK, LOG, folder_name, lineage_file
from fedllm.registry.verification import (
    Check,
    check_aliases,
    check_registry,
    check_version,
    logged_lineage,
    logged_statement,
    read_log,
)
from fedllm.runs.lineage import LINEAGE as RUN_LINEAGE
from fedllm.runs.lineage import UNLEARNED, noted_clients, statement_of_adapter, statement_of_run
from fedllm.runs.withdrawals import read_withdrawals, withdrawn_of
from fedllm.signing.statement import AdapterStatement, payload_of, sign_adapter, signature_digest

PRODUCTION = "production"
WITHDRAWN = "made with the rows of a site that has withdrawn"  # no name: a registry is shown to others
EXACT = frozenset("AC")  # classes of unlearning after which nothing of the client is left (unlearning.md)
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}")  # never a number, and a file name everywhere


@dataclass(frozen=True)
class Version:
    """One version: where it is, what its signer says of it, which aliases point to it.

    `digest` is the SHA-256 of its signature file. `mark` is why it is never promoted, "" where it may be.
    """

    number: int
    folder: Path
    digest: str
    signer: str
    statement: AdapterStatement
    aliases: tuple[str, ...] = ()
    mark: str = ""

    @property
    def weights(self) -> str:
        """The SHA-256 of its weights, by which the statement of a later adapter names it as a parent."""
        return self.statement.files[WEIGHTS]


def inherits(said: AdapterStatement, weights: Collection[str]) -> bool:
    """Return whether an adapter has one of these weights, or was made from one.

    One that has unlearnt exactly owes nothing to the adapter that it was unlearnt from.
    """
    is_exact = said.unlearning is not None and said.unlearning.get("class") in EXACT
    owed = {each["digest"] for each in said.parents if not (is_exact and each["relation"] == UNLEARNED)}
    return not owed.union(() if is_exact else (said.files[WEIGHTS],)).isdisjoint(weights)


@dataclass(frozen=True)
class Registry:
    """The versions of one model; the model's name is that of the folder, which the first change makes.

    Readers need no lock: they see the log before a change or after it. A change raises ConfigError while
    another process makes one, and where the disk does not take it. Every method raises IntegrityError where
    what it reads is not as it was written.
    """

    folder: Path

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.folder.resolve().name

    def versions(self) -> tuple[Version, ...]:
        """Return all versions, the oldest first; their statements are checked, other files by `verify`."""
        return self._versions(self._history())

    def version(self, wanted: int | str) -> Version:
        """Return the version of a number, or the one that an alias points to.

        Raises:
            ConfigError: there is none.
        """
        history = self._history()
        return self._version(history, self._number(history, wanted))

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the entries of the log, the oldest first."""
        read_log(self.folder)
        if (self.folder / LOG).exists():
            yield from chained_log.read_entries(self.folder / LOG)

    def lineage(self, number: int) -> dict[str, Any]:
        """Return what a version's run kept for its server (lineage.json); {} where it came from no run."""
        content = logged_lineage(self.folder, number, self._history().added[number])
        return dict(json.loads(content)) if content else {}

    def descendants(self, number: int) -> tuple[Version, ...]:
        """Return the versions that were made from a version, directly or by way of others.

        An unlearned version is one of them; the relation stands in its statement.
        """
        family, found = {self.version(number).weights}, []
        for version in self.versions():  # the oldest first: a parent comes before what was made from it
            parents = {parent["digest"] for parent in version.statement.parents}
            if version.number != number and family & parents:
                family.add(version.weights)
                found.append(version)
        return tuple(found)

    def verify(self, trusted: Collection[str] = (), head: str = "") -> Check:
        """Check every line, file, signature and alias (`check_registry`)."""
        return check_registry(self.folder, trusted, head)

    def add(
        self, source: Path, key: Ed25519PrivateKey, gates: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Version:
        """Copy the adapter of a finished run, or an adapter folder, sign it as the next version, return that.

        `gates` holds {"value", "limit", "passed"} by name. A version that has the same statement
        already is returned, so adding again after a kill adds nothing. What was made from a marked version,
        or has its weights, is marked from the start, as is a run that a withdrawal has reached.

        Raises:
            IntegrityError: the adapter is not one that fedllm published, or was changed.
            ConfigError: it is private, or its run has not finished.
        """
        is_run = (source / "adapter").is_dir()
        adapter = source / "adapter" if is_run else source
        if load_adapter(adapter, made_here=is_run).is_private:
            raise ConfigError(f"{adapter} is private: made from one client's own text; it gets no version")
        said = statement_of_run(source) if is_run else statement_of_adapter(source)
        said = replace(said, name=self.name, gates=gates or {}, files=file_digests(adapter, but=(SIGNATURE,)))
        with self._changing() as history:
            versions = self._versions(history)
            for version in versions:
                if payload_of(version.statement) == payload_of(replace(said, version=version.number)):
                    return version
            number = history.next_number
            kept = (source / RUN_LINEAGE).read_bytes() if is_run else b""
            if kept:
                write_bytes(lineage_file(self.folder, number), kept)
            folder = self.folder / folder_name(number)
            with complete_folder(folder) as building:
                unsigned = shutil.ignore_patterns(SIGNATURE)  # what is there has another number, or none
                shutil.copytree(adapter, building, ignore=unsigned, dirs_exist_ok=True)
                write_manifest(building)  # one of the files that are signed
                refuse_difference(adapter, said.files, file_digests(building))  # it may change meanwhile
                sign_adapter(building, replace(said, version=number), key)
            lineage = hashlib.sha256(kept).hexdigest() if kept else ""
            added = {"digest": signature_digest(folder), "signer": public_text(key), "lineage": lineage}
            withdrawn = is_run and withdrawn_of(noted_clients(source), read_withdrawals(source))
            reasons = [WITHDRAWN] if withdrawn else []
            reasons += [each.mark for each in versions if each.mark and inherits(said, {each.weights})]
            added |= {"mark": reasons[0]} if reasons else {}
            self._write(ADDED, version=number, **added)
        return self.version(number)

    def promote(self, number: int, alias: str = PRODUCTION) -> Version:
        """Let an alias point to a version, once all its files are checked; nothing changes where it does.

        Raises:
            ConfigError: there is no such version, it is marked, a gate failed, or the alias is no name.
        """
        if not _ALIAS.fullmatch(alias):
            raise ConfigError(f"alias {alias!r}: a small letter, then small letters, digits, - and _")
        with self._changing() as history:
            version = self._version(history, self._number(history, number))
            if version.mark:
                raise ConfigError(
                    f"version {number} of {self.name} is marked, never promoted: {version.mark}"
                )
            for name, gate in version.statement.gates.items():
                if not gate["passed"]:
                    said = f"{gate['value']}, limit {gate['limit']}"
                    raise ConfigError(f"version {number} of {self.name} did not pass gate {name} ({said})")
            if history.current.get(alias) != number:
                self._point(PROMOTED, history, number, alias)
        return self.version(number)

    def rollback(self, alias: str = PRODUCTION) -> Version:
        """Let an alias point again to the version before, marked ones left out; return that version.

        Raises:
            ConfigError: there is no such alias, or no version before.
        """
        with self._changing() as history:
            self._number(history, alias)
            number = history.earlier(alias)
            if number is None:
                raise ConfigError(f"{self.name}: {alias} has pointed to no other version that may be used")
            self._point(ROLLED_BACK, history, number, alias)
        return self.version(number)

    def mark(self, number: int, reason: str) -> Version:
        """Keep a version from being promoted, as when its data was withdrawn; aliases stay until a rollback.

        Raises:
            ConfigError: there is no such version.
        """
        with self._changing() as history:
            self._number(history, number)
            if history.marks.get(number) != reason:
                self._write(MARKED, version=number, reason=reason)
        return self.version(number)

    def note(self, event: str, **values: Any) -> None:
        """Add an entry of another kind to the log, such as an alarm.

        Raises:
            ValueError: the event is one of the registry's own, or a value is not JSON.
        """
        if event in EVENTS:
            raise ValueError(f"{event} is an event of the registry itself")
        with self._changing():
            self._write(event, **values)

    @contextmanager
    def _changing(self) -> Iterator[History]:
        """Keep other processes from changing the registry, mend what a killed one left; yield its state."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / LOCK) as is_free:
                if not is_free:
                    raise ConfigError(f"{self.folder}: another process is changing this registry; try again")
                yield self._mended()
        except FedLLMError:  # some are OSErrors too
            raise
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be changed ({error.strerror})") from None

    def _mended(self) -> History:
        """Remove what never became a version, bring `head` and aliases up to the log; return its state."""
        log = read_log(self.folder)
        behind = check_aliases(self.folder, log)
        number = log.history.next_number
        left = self.folder / folder_name(number)
        if left.exists():
            if not (left / SIGNATURE).exists():  # a version has its name when it is whole
                raise ConfigError(f"{left}: not made by this registry; move it, or name another folder")
            left.rename(left.with_name(f".{left.name}-unlogged"))  # in one step, so that it stays whole
        for folder in (self.folder, self.folder / ALIASES, self.folder / LINEAGE):
            remove_unfinished(folder)
        lineage_file(self.folder, number).unlink(missing_ok=True)
        if log.check.num_lines and log.noted != log.check.head:
            write_file(self.folder / HEAD, log.check.head + "\n")
        for alias in behind:
            self._write_alias(alias, log.history.current[alias])
        return log.history

    def _point(self, event: str, history: History, number: int, alias: str) -> None:
        check_version(self.folder, number, history.added[number])
        self._write(event, version=number, alias=alias)
        self._write_alias(alias, number)

    def _write(self, event: str, **values: Any) -> None:
        head = chained_log.append(self.folder / LOG, {"event": event, **values})
        write_file(self.folder / HEAD, head + "\n")

    def _write_alias(self, alias: str, number: int) -> None:
        write_file(self.folder / ALIASES / alias, folder_name(number) + "\n")

    def _history(self) -> History:
        return read_log(self.folder).history

    def _number(self, history: History, wanted: int | str) -> int:
        """Return the number of a version that is there."""
        text = str(wanted)
        number = int(text) if text.isdecimal() else history.current.get(text, 0)
        if number not in history.added:
            known = ", ".join([f"1 to {len(history.added)}" if history.added else "none", *history.current])
            raise ConfigError(f"{self.folder}: no version {text!r}; there are: {known}")
        return number

    def _versions(self, history: History) -> tuple[Version, ...]:
        return tuple(self._version(history, number) for number in history.added)

    def _version(self, history: History, number: int) -> Version:
        added = history.added[number]
        return Version(
            number,
            self.folder / folder_name(number),
            added.digest,
            added.signer,
            logged_statement(self.folder, number, added),
            tuple(alias for alias, current in history.current.items() if current == number),
            history.marks.get(number, ""),
        )
