"""What a client keeps for the secret sums of a run: its key, a secret, and what it masked under each label.

    key            the X25519 key of the run, made when the client joins, removed when the run is over
    secret         of its own masks and of its rounding
    encryption     where sums are encrypted: its pair of keys, of use only if it is the key holder
    LABEL.masked   which vector it has masked under a label, and with whom
    LABEL.asked    where sums are of shares: with whom, and which of them hold the shares
    LABEL.opened   for which sum it has opened shares: that of the parties that answered

Two vectors under the masks of one label differ by what they hide, and shares for two lists of lost parties
take off masks that together hide nothing. So each file is written once, before an answer leaves, and what
differs from it is refused, whichever process is asked.

A backup of this folder that is put back forgets what left since then: keep none of it.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import CheckpointError, MaskReuseError, SecureError
from fedllm.files import make_private_folder, write_once
from fedllm.plan.run_plan import RunPlan
from fedllm.privacy.keys import kept_secret
from fedllm.secure.homomorphic import KeyPair, new_keys

SECURE = "secure"  # in the state folder
KEYS = ("key", "encryption", "secret")


@dataclass(frozen=True)
class RunKeys:
    """The folder of one client in one run; nothing in it ever leaves this machine."""

    folder: Path

    @property
    def private(self) -> bytes:
        """The X25519 key [32 bytes], made on first use.

        Raises:
            CheckpointError: it cannot be kept.
        """
        return kept_secret(self.folder / "key")

    @property
    def secret(self) -> bytes:
        """The secret [32 bytes] that no other machine has; raises as `private`."""
        return kept_secret(self.folder / "secret")

    @property
    def encryption(self) -> KeyPair:
        """The keys for encryption, made on first use.

        Raises:
            CheckpointError: they cannot be kept.
            MissingExtraError: TenSEAL is not installed.
        """
        file = self.folder / "encryption"
        try:
            make_private_folder(self.folder)
            return KeyPair.from_bytes(
                file.read_bytes() if file.exists() else write_once(file, new_keys().to_bytes())
            )
        except OSError as error:
            raise CheckpointError(
                f"the key {file} cannot be kept: {error.strerror}; let this user read and write there"
            ) from None

    def note(self, label: bytes, what: str, values: Mapping[str, Any]) -> None:
        """Keep what is done under a label, `what` being "masked" or "opened", before it leaves.

        Raises:
            MaskReuseError: something else was done under the label already.
            CheckpointError: it cannot be kept, so it must not leave.
        """
        content = json.dumps(values, sort_keys=True).encode()
        try:
            make_private_folder(self.folder)
            kept = write_once(self.folder / f"{label.hex()}.{what}", content)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be written ({error.strerror}), so no masked answer leaves; let this"
                " user write there"
            ) from None
        if kept != content:
            raise MaskReuseError(
                f"label {label.hex()[:8]} was {what} before, for something else; nothing leaves under it now"
            )

    def noted(self, label: bytes, what: str = "masked") -> dict[str, Any]:
        """Return what was masked under a label, or done otherwise.

        Raises:
            SecureError: nothing was.
            CheckpointError: what is kept of it cannot be read.
        """
        file = self.folder / f"{label.hex()}.{what}"
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise SecureError(f"nothing was {what} under label {label.hex()[:8]}") from None
        except (OSError, ValueError):
            raise CheckpointError(f"{file} is damaged; what was {what} is not known") from None
        return found

    def forget(self) -> None:
        """Remove the key and all that is kept, once no masked answer of the run is to be opened any more.

        Raises:
            CheckpointError: the key cannot be removed.
        """
        # The key first: without it nothing that is masked under an old label can be masked again.
        try:
            for name in KEYS:
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be removed ({error.strerror}), and the run it is of is over; remove it"
            ) from None
        shutil.rmtree(self.folder, ignore_errors=True)


def run_keys(state_path: Path, plan: RunPlan, client_id: str) -> RunKeys:
    """Return where a client keeps what is of this run, in this configuration of it."""
    return RunKeys(state_path / SECURE / f"{plan.config.run.name}-{plan.digest[:16]}" / client_id)
