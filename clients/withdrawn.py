"""Withdrawal at the site: after it no question about its rows is answered, whoever asks.

`withdrawn.json` in the state folder holds every withdrawal with its signed record (`fedllm.withdrawal`), and
from then on a server is sent nothing but that. It is read for every question, so it binds at once, and after
any restart.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from clients.site import NodeConfig, data_path_of
from fedllm.chained_log import append
from fedllm.errors import ConfigError, PolicyError, WithdrawnError
from fedllm.files import locked, make_private_folder, write_file
from fedllm.identity import load_key
from fedllm.site_policy import SitePolicy
from fedllm.withdrawal import sign_withdrawal

FILE = "withdrawn.json"  # in the state folder


@dataclass(frozen=True)
class Withdrawn:
    """One withdrawal: a node of site.toml, its client's name and its rows; "" as a node is the whole site."""

    node: str
    client: str
    data: str
    record: str

    @property
    def who(self) -> str:
        """What has withdrawn, in words."""
        return f"node {self.node}" if self.node else "this site"

    def covers(self, node: str, config: NodeConfig) -> bool:
        """Return whether a question to a node is about what was withdrawn, whatever it is called now."""
        if not self.node or self.node == node or self.client == config.get("client-id"):
            return True
        return bool(self.data) and self.data == str(data_path_of(config))  # under another name


def check_not_withdrawn(policy: SitePolicy, node: str, config: NodeConfig) -> None:
    """Refuse every question about rows that were withdrawn; nothing is opened before.

    Raises:
        WithdrawnError: they were; it holds the record that a server is sent.
        PolicyError: the file is damaged, so nobody knows what was withdrawn.
    """
    for one in read_withdrawn(policy.state_folder):
        if one.covers(node, config):
            raise WithdrawnError(
                f"{policy.state_folder / FILE}: {one.who} has withdrawn", one.record.encode()
            )


def read_withdrawn(state: Path) -> tuple[Withdrawn, ...]:
    """Return the withdrawals that a state folder holds.

    Raises:
        PolicyError: they cannot be read; then nothing may leave.
    """
    file = state / FILE
    try:
        return tuple(Withdrawn(**one) for one in json.loads(file.read_text()))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError):
        raise PolicyError(f"{file} cannot be read, so nothing leaves; restore it") from None


def withdraw(policy: SitePolicy, node: str, reason: str, log: Path) -> bytes:
    """Withdraw a node, or with "" the whole site; return the signed record once all of it is on disk.

    `reason` goes to the site's own `log` and nowhere else.

    Raises:
        ConfigError: the site has no key to sign with, or the record cannot be written.
        PolicyError: there is no such node, or what was withdrawn before cannot be read.
    """
    if not policy.site.key:
        raise ConfigError(f"{policy.file}: [site] key must be set: a withdrawal is signed; `fedllm keys new`")
    config = policy.node_config(node) if node else {}
    client, data = str(config.get("client-id", "")), str(data_path_of(config) or "")
    clients = [client] if node else []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = sign_withdrawal(load_key(policy.path(policy.site.key)), clients, now)
    file = policy.state_folder / FILE
    try:
        make_private_folder(file.parent)
        with locked(file.with_suffix(".lock")) as is_free:
            if not is_free:
                raise ConfigError(f"{file}: another withdrawal is being written; try again")
            entries = (*read_withdrawn(file.parent), Withdrawn(node, client, data, record.decode()))
            write_file(file, json.dumps([asdict(one) for one in entries], indent=1) + "\n")
        append(log, {"event": "withdrawn", "node": node, "reason": reason})
    except PolicyError:  # an OSError too
        raise
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); let this user write") from None
    return record
