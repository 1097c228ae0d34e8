"""The processes of Flower's server on this machine, SuperLink and SuperExec, each for the length of a block.

Each has a Flower home of its own and an empty working directory (a process started inside a checkout would
import that checkout's code instead of the submitted app's), and ends with whoever started it.

With `Credentials` a `Link` is hardened: TLS, SuperNodes that prove a registered key, and programs that Flower
starts only for a SuperExec that knows a secret. Without, it is plain HTTP, for simulations.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from fedllm.errors import ConfigError, RunFailedError
from fedllm.files import locked
from scripts.deploying.certificates import Credentials, new_credentials, read_public_key

_GUARD = Path(__file__).with_name("guard.py")
_PREFIX, _OWNER = "fedllm-flower-", ".owner.lock"  # of temporary folders
# Below it Ray makes sockets, whose names hold 107 letters; its sessions then go with the folder.
_LONGEST_FOLDER = 40
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
LARGEST_LOG = 2**24  # bytes, beyond which a process that is started again begins a new one
_KNOWN_KEY = 412  # HTTP status


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of every Flower process: quiet, offline, and with a home of its own."""
    programs = str(Path(sys.executable).parent)  # Flower starts its own helpers by name
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1",  # at 0.1 a SuperLink or node takes 5 % of a core, idle
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
    }


@dataclass(frozen=True)
class Link:
    """A SuperLink on a loopback port: where its processes write, and what a client of it needs."""

    folder: Path  # logs, Flower homes and the database
    port: int
    credentials: Credentials | None = None  # None: plain HTTP

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What the SuperLink prints."""
        return self.folder / "superlink.log"

    @property
    def trust(self) -> list[str]:
        """The arguments of a Flower program that connects to this SuperLink."""
        return (
            ["--root-certificates", str(self.credentials.authority)] if self.credentials else ["--insecure"]
        )

    def environment(self, name: str = "cli") -> dict[str, str]:
        """Return the environment of a client of this SuperLink; each name has its own Flower home."""
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        if name == "cli":
            trust = (
                {"root-certificates": str(self.credentials.authority)}
                if self.credentials
                else {"insecure": True}
            )
            here = {"default": "here", "here": {"address": self.address, **trust}}
            (home / "config.toml").write_text(tomli_w.dumps({"superlink": here}))
        return flower_environment(home)

    def is_open(self) -> bool:
        """Return whether a SuperLink listens."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def temporary_link(*, is_hardened: bool) -> Iterator[Link]:
    """Make a folder and a port for a SuperLink, and remove the folder after."""
    with temporary_folder(_PREFIX) as folder:
        credentials = new_credentials(folder / "credentials", []) if is_hardened else None
        yield Link(folder, free_port(), credentials)


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder, and remove it after; those of processes that were killed are removed as well."""
    _remove_abandoned(prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        with locked(folder / ".new.lock"):
            (folder / ".new.lock").rename(folder / _OWNER)  # held from the moment it has that name
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(prefix: str) -> None:
    """Remove temporary folders whose owner lives no more: the system has freed its lock."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        # One without the file is being made just now; the folders of other users cannot be opened.
        with suppress(OSError), locked(folder / _OWNER, makes=False) as is_free:
            if is_free:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def superlink(
    link: Link, *, is_simulation: bool = False, variables: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a SuperLink for the length of the block; it listens when the block begins.

    Its database lies in the link's folder, so one that is started there again after a kill knows its runs. A
    hardened one runs no ServerApp without a `superexec` beside it, which outlives it.

    Raises:
        RunFailedError: its port is taken, or it does not come to listen; its last line is quoted.
    """
    if link.is_open():  # else whoever has the port would be taken for the SuperLink
        raise RunFailedError(
            f"port {link.port} of this machine is taken by another program: end it, or choose another port"
        )
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(link.port)]
    command += ["--disable-runtime-dependency-installation"]
    command += ["--simulation"] if is_simulation else []
    if own := link.credentials:
        command += ["--ssl-ca-certfile", str(own.authority), "--ssl-certfile", str(own.certificate)]
        command += ["--ssl-keyfile", str(own.key), "--enable-supernode-auth", "--isolation", "process"]
        command += ["--superexec-auth-secret-file", str(own.superexec_secret)]
        database = link.folder / "superlink.db"
        database.touch(mode=0o600)  # it holds updates; SQLite gives its other files the same mode
        command += ["--database", str(database)]
    else:
        command += ["--insecure"]
    ray = {"RAY_TMPDIR": str(link.folder)} if len(str(link.folder)) < _LONGEST_FOLDER else {}
    environment = link.environment("superlink") | ray | dict(variables or {})
    with process(command, link.folder, environment, "superlink") as running:
        _wait_until_open(link, running)
        yield running


@contextmanager
def superexec(link: Link, variables: Mapping[str, str] | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """Run what starts the ServerApps of a hardened SuperLink, which it waits for while it is away."""
    assert link.credentials, "a plain SuperLink starts its own"
    command = ["flower-superexec", "--runtime-api-address", link.address, *link.trust]
    command += ["--superexec-auth-secret-file", str(link.credentials.superexec_secret)]
    environment = link.environment("superexec") | dict(variables or {})
    with process(command, link.folder, environment, "superexec") as running:
        yield running


def register(link: Link, public_key: Path) -> None:
    """Admit a SuperNode's key to a hardened SuperLink; one that it knows already stays admitted.

    Raises:
        ConfigError: the file holds no such key, or no SuperLink with these credentials answers.
        RunFailedError: the SuperLink refuses it.
    """
    from flwr.proto.control_pb2 import RegisterNodeRequest

    try:
        with _control(link) as client:
            client.RegisterNode(RegisterNodeRequest(public_key=read_public_key(public_key)))
    except httpx.HTTPStatusError as error:
        if error.response.status_code != _KNOWN_KEY:
            raise RunFailedError(f"the SuperLink refuses {public_key}: {error.response.text}") from None
    except httpx.TransportError as error:
        raise ConfigError(f"no SuperLink with these credentials answers on {link.address}: {error}") from None


def stop_run(link: Link, run_id: str) -> None:
    """Stop a run at a hardened SuperLink, if it answers, so that nodes begin no more of its messages."""
    from flwr.proto.control_pb2 import StopRunRequest

    with suppress(httpx.HTTPError), _control(link) as client:
        client.StopRun(StopRunRequest(run_id=int(run_id)))


def stop_unfinished(link: Link) -> None:
    """Stop the runs that a hardened SuperLink has of an earlier session, before a SuperExec starts them."""
    from flwr.proto.control_pb2 import ListRunsRequest, StopRunRequest

    with suppress(httpx.HTTPError), _control(link) as client:
        for run_id, run in client.ListRuns(ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":
                client.StopRun(StopRunRequest(run_id=run_id))


@contextmanager
def _control(link: Link) -> Iterator[Any]:
    """Open Flower's own client: the `flwr` command does the same in two seconds of CPU."""
    from flwr.supercore.control.control_http_client import ControlHttpClient

    assert link.credentials
    trusted = link.credentials.authority.read_bytes()
    client = ControlHttpClient.from_server_address(link.address, False, trusted, [])
    try:
        yield client
    finally:
        client.close()


def flwr(link: Link, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the JSON that a `flwr` command prints; {} where it prints none."""
    program = str(Path(sys.executable).with_name("flwr"))
    done = subprocess.run(
        [program, *arguments],
        cwd=link.folder,
        env=link.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    start = done.stdout.find("{")
    try:
        parsed = json.loads(done.stdout[start:]) if start >= 0 else {}
    except ValueError:
        parsed = {}
    return parsed if isinstance(parsed, dict) else {}


@contextmanager
def process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], name: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a console script of this environment in a session of its own, and end all of that session after.

    What it prints is added to `name`.log in `folder`. It ends as well when this process does, however that
    comes about (`scripts.runtimes.guard`).
    """
    program = str(Path(sys.executable).with_name(command[0]))
    running = start_guarded([program, *command[1:]], folder, environment, folder / f"{name}.log")
    try:
        yield running
    finally:
        end_session(running)


def start_guarded(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, **options: Any
) -> "subprocess.Popen[bytes]":
    """Start a program under a guard; `options` are further ones of `Popen`. Whoever starts it ends it.

    What it prints is added to `log`; a large one is kept as `log`.old, and the one before that is lost.
    """
    if log.exists() and log.stat().st_size > LARGEST_LOG:
        log.replace(log.with_name(f"{log.name}.old"))
    # Root writes to folders of a site's other users, whose links must not lead it elsewhere.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(log, flags, 0o600), "ab") as written:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )


def end_session(running: "subprocess.Popen[bytes]") -> None:
    """Ask a guarded command to end; where it does not, its guard kills it and all that it started."""
    assert running.stdin is not None
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        running.wait(_STOP_SECONDS)
    running.stdin.close()
    running.wait()


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_open(link: Link, running: "subprocess.Popen[bytes]") -> None:
    ends = time.monotonic() + _START_SECONDS
    while time.monotonic() < ends and running.poll() is None:
        if link.is_open():
            return
        time.sleep(0.1)
    last = link.log.read_text(errors="replace").strip().splitlines()[-1:]
    raise RunFailedError(f"the SuperLink did not open {link.address}: {' '.join(last)}")
