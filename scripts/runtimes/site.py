"""The processes of a site, from its site.toml: its service, and a SuperNode and a SuperExec for each node.

The service and the nodes may be of two users of this machine. Then the nodes' user, under which Flower runs,
can read neither rows nor model, keys or state: it reaches the socket of the service and nothing else.
"""

import json
import os
import pwd
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.site_protocol import KEYS, LAUNCH_KEY, SOCKET, digest_of
from fedllm.errors import ConfigError
from fedllm.files import make_private_folder
from fedllm.site_policy import SiteNode, SitePolicy
from scripts.deploying.refusals import why_a_node_ended
from scripts.runtimes.processes import (
    end_session,
    flower_environment,
    free_port,
    start_guarded,
    temporary_folder,
)

_ROOT = Path(__file__).parents[2]  # where `clients` lies, in a checkout and where it is installed
_POLL_SECONDS = 0.25
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0  # s, before what has died is started again
_STEADY_SECONDS = 60.0  # who lives so long has a first pause again
_TAIL_BYTES = 4000  # of a log, in which the end of a process is explained
_LONGEST_SOCKET = 100  # letters: the system takes 107
# What of the starter's environment a node sees: it needs no more, and tokens may be in the rest.
_FOR_NODES = ("LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "HTTPS_PROXY", "NO_PROXY", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Account:
    """A user of this machine; `name` is "" for whoever runs this process."""

    name: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What `Popen` takes to start a process of this user."""
        if not self.name:
            return {}
        entry = pwd.getpwnam(self.name)
        groups = os.getgrouplist(self.name, entry.pw_gid)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}

    @property
    def variables(self) -> dict[str, str]:
        """Their home and name, as a log-in would set them; one's own are those of the environment."""
        if not self.name:
            return {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME") if name in os.environ}
        entry = pwd.getpwnam(self.name)
        return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}

    def may_read(self, path: Path) -> bool:
        """Return whether they can read a file or list a folder."""
        return subprocess.run(["test", "-r", str(path)], check=False, **self.options).returncode == 0

    def owns(self, *paths: Path) -> None:
        """Make files and folders theirs."""
        if self.name:
            entry = pwd.getpwnam(self.name)
            for path in paths:
                # A link that this user has put there must not hand them what it leads to.
                os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def account_of(name: str) -> Account:
    """Return the account that site.toml names.

    Raises:
        ConfigError: there is none of that name, or this process may not start processes of it.
    """
    if not name or name == pwd.getpwuid(os.getuid()).pw_name:
        return Account()
    try:
        pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"site.toml names the user {name!r}, and this machine has none") from None
    if os.getuid() != 0:
        raise ConfigError(f"only root may start processes of the user {name!r}; start the site as root")
    return Account(name)


@dataclass(eq=False)
class Tended:
    """A process that is started again whenever it ends."""

    title: str
    start: Callable[[], "subprocess.Popen[bytes]"]
    log: Path
    running: "subprocess.Popen[bytes]"
    began: float = field(default_factory=time.monotonic)
    pause: float = _FIRST_PAUSE
    due: float = 0.0  # when it is started again, 0 while it runs

    def tend(self, tell: Callable[[str], None]) -> None:
        """Notice that it has ended, and start it again when that is due."""
        now = time.monotonic()
        if self.due and now >= self.due:
            self.running, self.began, self.due = self.start(), now, 0.0
        elif not self.due and self.running.poll() is not None:
            if now - self.began > _STEADY_SECONDS:
                self.pause = _FIRST_PAUSE
            tell(f"{self.title} has ended ({last_words(self.log)}); it is started again in {self.pause:g} s")
            self.due, self.pause = now + self.pause, min(2 * self.pause, _LONGEST_PAUSE)


@dataclass(eq=False)
class Site:
    """A running site: where its service listens, where its processes write, and what they are."""

    policy: SitePolicy
    socket: Path
    logs: Path
    processes: list[Tended] = field(default_factory=list)

    def tend(self, tell: Callable[[str], None], until: Callable[[], bool] = lambda: False) -> None:
        """Start again whatever ends, until `until` says so."""
        while not until():
            for one in self.processes:
                one.tend(tell)
            time.sleep(_POLL_SECONDS)


@contextmanager
def running_site(
    policy: SitePolicy, *, logs: Path | None = None, variables: Mapping[str, str] | None = None
) -> Iterator[Site]:
    """Run the service and the nodes of a site.toml for the length of the block; nothing of them outlives it.

    They write to `logs`, else below the state folder; `variables` are added to the service's environment.

    Raises:
        ConfigError: the file names a user that cannot be used, or its socket's path is too long.
        PolicyError: a node's data is outside the data root.
    """
    assert policy.file is not None
    owner, messenger = account_of(policy.site.user), account_of(policy.site.node_user)
    if owner.name and not policy.site.state_path:
        raise ConfigError(f"{policy.file}: with [site] user set, state-path must be set too")
    if owner.name and not messenger.name:
        raise ConfigError(f"{policy.file}: with [site] user set, node-user must be set too, and not to root")
    for name, node in policy.nodes.items():
        if not node.superlink:
            raise ConfigError(
                f"{policy.file}: nodes.{name}.superlink must be set, to host:port of the server"
            )
        policy.node_config(name)  # its refusals now, not at the first message
    with temporary_folder("fedllm-site-") as folder:
        folder.chmod(0o755)
        place = policy.path(policy.site.socket) if policy.site.socket else folder / "socket" / "site.sock"
        logs = logs or policy.state_folder / "logs"
        make_private_folder(logs)
        owner.owns(policy.state_folder, logs)
        site = Site(policy, place, logs)
        keys = {name: secrets.token_urlsafe(32) for name in policy.nodes}
        with _listen(place, owner, messenger) as listening:
            try:
                site.processes.append(_service(site, folder, owner, listening, keys, variables or {}))
                program = _launcher(folder)
                for name, node in policy.nodes.items():
                    site.processes += _node(site, folder / name, messenger, name, node, keys[name], program)
                yield site
            finally:
                for one in site.processes:  # together first, so that none waits for another's end
                    with suppress(ProcessLookupError):
                        os.killpg(one.running.pid, signal.SIGTERM)
                for one in site.processes:
                    end_session(one.running)
                place.unlink(missing_ok=True)


def _listen(place: Path, owner: Account, messenger: Account) -> socket.socket:
    """Return a socket in a folder that only the service's user, and the group of the nodes' user, may pass.

    It is opened here and handed on, so a messenger waits in its queue while the service starts again.

    Raises:
        ConfigError: its path is too long, its folder is everybody's, or another site's service listens.
    """
    if len(str(place)) > _LONGEST_SOCKET:
        raise ConfigError(f"{place}: too long for the path of a socket ({_LONGEST_SOCKET} letters)")
    make_private_folder(place.parent)
    if place.parent.stat().st_mode & 0o007:
        raise ConfigError(f"{place.parent}: every user may enter the socket's folder; give it one of its own")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(place)) == 0:
            raise ConfigError(f"{place}: another site's service listens; end it, or choose another socket")
    place.unlink(missing_ok=True)  # a killed site's
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(place))
    listening.listen(128)
    place.chmod(0o600)
    owner.owns(place.parent, place)
    if messenger != owner and os.getuid() == 0:
        group = pwd.getpwnam(messenger.name).pw_gid if messenger.name else os.getgid()
        os.chown(place.parent, -1, group)
        os.chown(place, -1, group)
        place.parent.chmod(0o710)
        place.chmod(0o660)
    return listening


def _service(
    site: Site,
    folder: Path,
    owner: Account,
    listening: socket.socket,
    keys: Mapping[str, str],
    variables: Mapping[str, str],
) -> Tended:
    nodes = json.dumps({digest_of(key): name for name, key in keys.items()})
    environment = {**os.environ, **owner.variables, **_python_path(), **variables, KEYS: nodes}
    environment["FEDLLM_SITE"] = str(site.policy.file)
    command = [sys.executable, "-m", "clients.service", str(listening.fileno())]
    log, work = site.logs / "service.log", folder / "service"
    work.mkdir(mode=0o700)
    owner.owns(work)

    def start() -> "subprocess.Popen[bytes]":
        return start_guarded(command, work, environment, log, pass_fds=[listening.fileno()], **owner.options)

    return Tended("the service", start, log, start())


def _node(
    site: Site, folder: Path, account: Account, name: str, node: SiteNode, key: str, program: Path
) -> list[Tended]:
    """Start a SuperNode, and the SuperExec that starts a messenger for each of its messages."""
    folder.mkdir(mode=0o700)
    secret, home, port = folder / "secret", folder / "home", free_port()
    home.mkdir(mode=0o700)
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32))
    account.owns(folder, home, secret)
    known = {variable: os.environ[variable] for variable in _FOR_NODES if variable in os.environ}
    flower = {name: text for name, text in flower_environment(home).items() if name.startswith("FLWR_")}
    environment = {**known, **flower, **account.variables, **_python_path()}
    # Nothing else is found: Flower's own program of that name would run the code that the server ships.
    environment["PATH"] = str(program.parent)
    environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(_POLL_SECONDS)
    python = [sys.executable, "-m", "clients.flower_programs"]
    shared = ["--superexec-auth-secret-file", str(secret)]
    supernode = [*python, "supernode", "--superlink", node.superlink, "--port", str(port), *shared]
    supernode += ["--isolation", "process", *_trust(site.policy, node)]
    superexec = [*python, "superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}", *shared]
    own = {LAUNCH_KEY: key, SOCKET: str(site.socket)}
    kept = []
    for title, command, variables in (("node", supernode, {}), ("SuperExec of node", superexec, own)):
        log = site.logs / f"{title.split()[0].lower()}-{name}.log"

        def start(
            command: list[str] = command, log: Path = log, variables: Mapping[str, str] = variables
        ) -> "subprocess.Popen[bytes]":
            return start_guarded(command, folder, environment | dict(variables), log, **account.options)

        kept.append(Tended(f"{title} {name}", start, log, start()))
    return kept


def _trust(policy: SitePolicy, node: SiteNode) -> list[str]:
    """Return how a node knows its server, and how the server knows the node."""
    key = ["--auth-supernode-private-key", str(policy.path(node.private_key))] if node.private_key else []
    if node.root_certificates:
        return ["--root-certificates", str(policy.path(node.root_certificates)), *key]
    host = node.superlink.rpartition(":")[0]
    # Unencrypted on this machine only; elsewhere the authorities that the system trusts are asked.
    return ["--insecure"] if host in ("127.0.0.1", "localhost", "[::1]") else key


def _launcher(folder: Path) -> Path:
    """Write the program that a SuperExec finds in place of Flower's own, and return its path.

    Raises:
        ConfigError: no program of the temporary folder can be started.
    """
    programs = folder / "bin"
    programs.mkdir()
    programs.chmod(0o755)
    program = programs / "flwr-clientapp"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m clients.launcher "$@"\n')
    program.chmod(0o755)
    if not os.access(program, os.X_OK):
        raise ConfigError(f"{folder}: its file system is mounted noexec; set TMPDIR to a folder of another")
    return program


def _python_path() -> dict[str, str]:
    """Return where every process of the site finds this installation's modules, whatever its folder."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys([str(_ROOT), *others]))}


def last_words(log: Path) -> str:
    """Return why a process ended, in a line: cause and cure where they are known, else its last words."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
        told = [line.strip() for line in text.splitlines() if any(letter.isalnum() for letter in line)]
        if told:
            return why_a_node_ended(text) or told[-1][:200]
    return "without a word"
