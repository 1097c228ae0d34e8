"""One run through Flower's own processes on this machine: `flwr run`, and what came of it.

The run's true status comes from `flwr ls`: `flwr run --stream` exits 0 on failure.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
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
from scripts.runtimes.processes import Link, flwr, superexec, superlink, supernode, temporary_link

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
_LONGEST_SILENCE_SECONDS = 60.0  # before Flower is asked whether a run still lives
_CLOSING_SECONDS = 1.0  # the same, where the run has left its result
_ENDED = "Finished task"  # what a SuperLink logs at the end of a run, however it ended


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
        link = stack.enter_context(temporary_link(is_hardened=not is_simulation))
        site = link.folder / "site.toml"
        site.write_text(tomli_w.dumps({"site": {"state-path": private}, "allow": {"server-paths": True}}))
        variables = {"FEDLLM_SITE": str(site)}
        stack.enter_context(superlink(link, is_simulation=is_simulation, variables=variables))
        federation: dict[str, Scalar] = {}
        if is_simulation:
            federation = simulation_size(config)
        else:
            stack.enter_context(superexec(link, variables))
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
    log, said, heard = link.log, (0, 0), time.monotonic()
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
            if now == "unknown" and not link.is_open():
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
