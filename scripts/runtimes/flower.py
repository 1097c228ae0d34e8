"""Real Flower processes for one run on this machine: a SuperLink, SuperNodes or a simulation, and `flwr run`.

Each run gets a Flower home of its own, ports of its own and an empty working directory (a SuperLink started
inside a checkout would import that checkout's code instead of the submitted app's). The run's true status
comes from `flwr ls`: `flwr run --stream` exits 0 on failure.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.data.rows import is_local
from fedllm.errors import RunFailedError
from fedllm.models.files import is_local_model
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import ROUNDS, run_folder, to_toml
from fedllm.runs.records import record_from_dict
from scripts.run_view import RunView
from scripts.runtimes.machine import gpus_of, simulation_size

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_LONGEST_SILENCE_SECONDS = 60.0  # before Flower is asked whether a run still lives
_CLOSING_SECONDS = 1.0  # the same, where the run has left its result
_ENDED = "Finished task"  # what a SuperLink logs at the end of a run, however it ended
_CONNECTION = """[superlink]
default = "here"

[superlink.here]
address = "{address}"
insecure = true
"""


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
    """A running SuperLink and what a client of it needs."""

    folder: Path
    port: int

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    def environment(self, name: str = "cli") -> dict[str, str]:
        """Return the environment of a client of this SuperLink; each name has its own Flower home."""
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        return flower_environment(home)


@contextmanager
def superlink(*, is_simulation: bool, policy: str = "") -> Iterator[Link]:
    """Run a SuperLink on a free loopback port for the length of the block.

    `policy` is the site policy of the processes a simulation starts (fedllm.site_policy).
    """
    folder = Path(tempfile.mkdtemp(prefix="fedllm-flower-"))
    link = Link(folder, _free_port())
    (folder / "site.toml").write_text(policy)
    environment = link.environment("superlink") | (
        {"FEDLLM_SITE": str(folder / "site.toml")} if policy else {}
    )
    command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link.port)]
    command += ["--disable-runtime-dependency-installation"]
    command += ["--simulation"] if is_simulation else []
    try:
        with process(command, folder, environment, "superlink") as running:
            _wait_for_port(link, running)
            home = folder / "home-cli"
            home.mkdir(exist_ok=True)
            (home / "config.toml").write_text(_CONNECTION.format(address=link.address))
            yield link
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def supernode(
    link: Link, name: str, node_config: Mapping[str, Scalar], variables: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a SuperNode with its own home and environment `variables` for the length of the block."""
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in node_config.items())
    command = ["flower-supernode", "--insecure", "--superlink", link.address]
    command += ["--port", str(_free_port()), "--node-config", config]
    with process(command, link.folder, link.environment(name) | dict(variables or {}), name):
        yield


@contextmanager
def process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], name: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a console script of this environment in a session of its own, and end all of that session after.

    It ends as well when this process does, however that comes about (`scripts.runtimes.guard`).
    """
    program = str(Path(sys.executable).with_name(command[0]))
    with (folder / f"{name}.log").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-I", "-S", str(HERE / "guard.py"), program, *command[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield running
    finally:
        _end_session(running)


def _end_session(running: "subprocess.Popen[bytes]") -> None:
    """Ask a guarded command to end; where it does not, its guard kills it and all that it started."""
    assert running.stdin is not None
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        running.wait(_STOP_SECONDS)
    running.stdin.close()
    running.wait()


def app_folder(link: Link) -> Path:
    """Return the folder that `flwr run` packs: this checkout, or a copy of what the wheel installed.

    Flower wants pyproject.toml next to the packages. A checkout has it there; the wheel has it next to this
    module.
    """
    if not (HERE / "pyproject.toml").is_file():
        return ROOT
    app = link.folder / "app"
    for package in ("fedllm", "clients", "strategies"):
        shutil.copytree(ROOT / package, app / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(HERE / name, app)
    return app


def submit(link: Link, config: RunConfig, federation: Mapping[str, Scalar]) -> str:
    """Send the app to the SuperLink and return its run id.

    Raises:
        RunFailedError: Flower refuses it; its own words are quoted.
    """
    overrides = link.folder / "run-config.toml"
    overrides.write_text(to_toml(config))
    command = ["run", str(app_folder(link)), "here", "--format", "json", "--run-config", str(overrides)]
    if federation:
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in federation.items())
        command += ["--federation-config", pairs]
    answer = flwr(link, command)
    run_id = answer.get("run-id")
    if not run_id:
        raise RunFailedError(f"flwr run failed: {answer.get('error-message', 'no run id')}")
    return str(run_id)


def status(link: Link, run_id: str) -> str:
    """Return Flower's status of a run, such as "running" or "finished:completed"."""
    answer = flwr(link, ["ls", "here", "--run-id", run_id, "--format", "json"])
    runs = answer.get("runs")
    return str(runs[0].get("status", "unknown")) if runs else "unknown"


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


def run_with_flower(config: RunConfig, view: RunView, *, is_simulation: bool) -> None:
    """Run `config` as a Flower simulation, or with one SuperNode per client on loopback.

    Raises:
        RunFailedError: the run does not complete; the reason is the run's own.
    """
    config = _with_absolute_paths(config)
    (run_folder(config) / "result.json").unlink(missing_ok=True)  # an earlier attempt's
    with ExitStack() as stack:
        # This machine's user named the data source, so its own nodes may open it; what their clients keep for
        # themselves lies where a resumed run finds it.
        private = str(run_folder(config) / "private")
        policy = tomli_w.dumps({"server-paths": True, "state-path": private})
        link = stack.enter_context(superlink(is_simulation=is_simulation, policy=policy))
        federation: dict[str, Scalar] = {}
        if is_simulation:
            federation = simulation_size(config)
        else:
            number, gpus = config.federation.num_clients, gpus_of(config)
            for index in range(number):
                node: dict[str, Scalar] = {
                    "partition-id": index,
                    "num-partitions": number,
                    "server-paths": True,
                    "state-path": private,
                }
                gpu = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
                stack.enter_context(supernode(link, f"node-{index}", node, gpu))
        num_old = len(_lines(run_folder(config) / ROUNDS))
        run_id = submit(link, config, federation)
        view.notice(f"Flower run {run_id} on {link.address}")
        ended = follow(link, run_id, run_folder(config), view, num_old)
        result = _result_of(run_folder(config))
        # Flower calls some failed simulations completed, so the run's own word counts as well.
        if ended != "finished:completed" or result.get("status") != "completed":
            kept = keep_logs(link, run_id, run_folder(config))
            reason = str(result.get("reason", f"Flower ended the run as {ended}, see {kept}"))
            said = said_by_nodes(kept.read_text(errors="replace"), reason)
            raise RunFailedError("; ".join([reason, *said]))


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with every local path absolute: Flower's processes start in another folder."""
    changes: dict[str, Scalar] = {"run.output": str(run_folder(config).parent)}
    if is_local(config.data.source):
        changes["data.source"] = _absolute(config.data.source)
    distillation = resolve(config).distillation
    public = distillation.public_source if distillation else ""
    if public and is_local(public):
        before = config.distill.text.strip().removesuffix(public)
        changes["distill.text"] = before + _absolute(public)
    if is_local_model(config.model.name):
        changes["model.name"] = str(Path(config.model.name).expanduser().absolute())
    return config.override(changes)


def _absolute(source: str) -> str:
    """Return a path, or paths parted by commas, from the root."""
    return ",".join(str(Path(part.strip()).expanduser().absolute()) for part in source.split(","))


def follow(link: Link, run_id: str, folder: Path, view: RunView, num_old: int = 0) -> str:
    """Show the rounds a run writes to its folder until Flower says that it has ended; return the status.

    The first `num_old` of them are of a session before this one.

    Asking Flower costs a second of CPU, which training would miss. So it is asked when its
    SuperLink logs that the run has ended, and after a minute without news, as of a run that was killed.
    """
    rounds, shown, seen = folder / ROUNDS, 0, (0, 0)
    log, said, heard = link.folder / "superlink.log", (0, 0), time.monotonic()
    while True:
        if rounds.exists() and _state(rounds) != seen:
            seen = _state(rounds)
            lines = _lines(rounds)
            for place, line in enumerate(lines[shown:], shown):
                show = view.replay if place < num_old else view.record
                show(record_from_dict(json.loads(line)))
            if len(lines) > shown:
                shown, heard = len(lines), time.monotonic()
        silence = _CLOSING_SECONDS if (folder / "result.json").exists() else _LONGEST_SILENCE_SECONDS
        if log.exists() and _state(log) != said:
            said = _state(log)
            silence = 0.0 if _ENDED in log.read_text(errors="replace") else silence
        if time.monotonic() > heard + silence:
            now = status(link, run_id)
            if now.startswith("finished"):
                return now
            if now == "unknown" and not _is_open(link):
                return "lost: its SuperLink has ended"
            heard = time.monotonic()
        time.sleep(0.2)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _state(file: Path) -> tuple[int, int]:
    """Return what tells one version of a growing file from the next; its time alone may be too coarse."""
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def said_by_nodes(log: str, reason: str) -> list[str]:
    """Return what nodes of this machine logged last of each code that the reason of a failed run names."""
    found = []
    for code in dict.fromkeys(re.findall(r"client reports ([a-z-]+)", reason)):
        said = re.findall(rf"\b{code}: (.+)", re.sub(r"\x1b\[[0-9;]*m", "", log))  # without colours
        found += said[-1:]
    return found


def keep_logs(link: Link, run_id: str, folder: Path) -> Path:
    """Save what Flower's processes printed to `flower.log` in the run folder, and return its path."""
    program = str(Path(sys.executable).with_name("flwr"))
    app_log = subprocess.run(
        [program, "log", run_id, "here", "--show"],
        cwd=link.folder,
        env=link.environment(),
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    parts = [f"== flwr log\n{app_log}"]
    for file in sorted(link.folder.glob("*.log")):
        parts.append(f"== {file.stem}\n{file.read_text(errors='replace')}")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "flower.log"
    kept.write_text("\n".join(parts))
    return kept


def _result_of(folder: Path) -> dict[str, Any]:
    """Return what the run says of its end, {} where it did not live to say it."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_open(link: Link) -> bool:
    """Return whether a SuperLink listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", link.port)) == 0


def _wait_for_port(link: Link, running: "subprocess.Popen[bytes]") -> None:
    ends = time.monotonic() + _START_SECONDS
    while time.monotonic() < ends and running.poll() is None:
        if _is_open(link):
            return
        time.sleep(0.1)
    last = (link.folder / "superlink.log").read_text(errors="replace").strip().splitlines()[-1:]
    raise RunFailedError(f"the SuperLink did not open {link.address}: {' '.join(last)}")
