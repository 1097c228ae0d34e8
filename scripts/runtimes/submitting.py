"""`flwr run` of one configuration on this machine's SuperLink, and what came of it.

`flwr run --stream` exits 0 on failure: the run's true end is its own `result.json`.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.data.rows import is_local
from fedllm.errors import RunFailedError
from fedllm.models.files import is_local_model
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import RESULT, run_folder, to_toml
from scripts.runtimes.processes import Link, flwr

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def app_folder(link: Link) -> Path:
    """Return the folder that `flwr run` packs: this checkout, or a copy of what the wheel installed.

    Flower wants pyproject.toml next to the packages. A checkout has it there; the wheel has it next to this
    module.
    """
    if not (HERE / "pyproject.toml").is_file():
        return ROOT
    app = link.folder / "app"
    shutil.rmtree(app, ignore_errors=True)  # of an earlier submission, or of an earlier release
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


def with_absolute_paths(config: RunConfig) -> RunConfig:
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


def check_completed(link: Link, run_id: str, folder: Path, ended: str = "finished:completed") -> None:
    """Keep the logs of a run that has not completed, and say why it has not.

    Flower calls some failed simulations completed (`ended`), so the run's own word counts as well.

    Raises:
        RunFailedError: it has not; the reason is the run's own, with what nodes of this machine said.
    """
    result = _result_of(folder)
    if ended != "finished:completed" or result.get("status") != "completed":
        kept = keep_logs(link, run_id, folder)
        reason = str(result.get("reason", f"Flower ended the run as {ended}, see {kept}"))
        raise RunFailedError("; ".join([reason, *said_by_nodes(kept.read_text(errors="replace"), reason)]))


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
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return {}
    return result
