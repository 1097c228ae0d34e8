"""docs/deploy.md, three machines from nothing: its commands and files, on one machine and on loopback.

Each machine is a folder; a tiny model and few rows take the place of real ones. `LEFT_OUT` has what cannot be
done here.
"""

import json
import re
import shlex
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from scripts.deploying.certificates import Credentials
from scripts.runtimes.processes import Link, flower_environment, free_port, process
from tests.fronts import front, installed
from tests.stories.conftest import FEDLLM

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
BLOCK = re.compile(r"^```(bash|toml)\n# ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = {
    "python3": "fedllm is installed",
    "/opt/fedllm/bin/pip": "fedllm is installed",
    "export": "fedllm is installed",
    "useradd": "a test adds no users; tests of the site service try two",
    "chown": "a test adds no users",
    "nginx": "its configuration is not that of this machine; it is run with the page's own",
}
SMALL: Mapping[str, dict[str, Any]] = {
    "federation": {"num-rounds": 1},
    "lora": {"rank": 4, "alpha": 8.0},
    "train": {"local-steps": 2, "batch-size": 2, "max-length": 48, "learning-rate": 1e-3},
    "evaluation": {"prompts": "", "max-new-tokens": 0},
}


@dataclass(frozen=True)
class Machine:
    """A machine of the page: what it is called there, and the folder that it is here."""

    name: str
    folder: Path
    port: int  # by which sites reach the server

    def here(self, text: str) -> str:
        """Return a text of the page with this machine's own paths and names."""
        for path in ("/etc/fedllm", "/var/lib/fedllm-site", "/var/lib/fedllm", "/srv/fedllm"):
            text = text.replace(path, str(self.folder / path[1:].replace("/", "-")))
        text = text.replace("fed.example.org:8443", f"127.0.0.1:{self.port}")
        return text.replace("hospital-a", "hospital-b") if self.name == "b" else text

    def run(self, line: str, *more: str) -> str:
        """Run a command of the page, and return what it prints."""
        words = shlex.split(self.here(line))
        variables = dict(word.split("=", 1) for word in words if word.startswith("FEDLLM_SITE="))
        words = [word for word in words if not word.startswith("FEDLLM_SITE=")]
        assert words[0] == "fedllm"
        environment = flower_environment(self.folder / "flower") | {"FEDLLM_SITE": ""} | variables
        done = subprocess.run(
            [FEDLLM, *words[1:], *more],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout


def steps() -> Iterator[tuple[str, str, str]]:
    """Yield each command and file of the page's walk in order: machine, file or "", text."""
    text = PAGE.read_text()
    walk = text[text.index("## Three machines") : text.index("## As a service")]
    for language, label, body in BLOCK.findall(walk):
        machines, _, file = label.partition(": ")
        names = ["server", "a", "b"] if machines == "every machine" else machines.split(", ")
        for name in names:
            if language == "toml":
                yield name, file, body
            else:
                yield from ((name, "", line) for line in body.splitlines() if line)


def fitted(path: Path, values: dict[str, Any], model: Path, told: Mapping[str, str]) -> dict[str, Any]:
    """Return a file of the page with what a test must have otherwise: a tiny model and run, real keys."""
    file = path.name
    if file == "run.toml":
        values |= {"model": {"name": str(model), "device": "cpu", "num-threads": 1}}
        for table, changes in SMALL.items():
            values[table] = values.get(table, {}) | changes
    if file == "site.toml":
        values["site"] = {key: value for key, value in values["site"].items() if not key.endswith("user")}
        values["allow"]["bundles"] = re.findall(r"\b[0-9a-f]{64}\b", told[path.parent.parent.name])
        for node in values["nodes"].values():
            node["model-path"] = str(model)
    for name, table in values.get("sites", {}).items():
        table["public-key"] = re.findall(r"ed25519:[\w+/=]+", told[name[-1]])[0]
    return values


def test_every_command_of_the_walk_is_run_or_left_out_for_a_reason():
    first = {
        shlex.split(text.removeprefix("FEDLLM_SITE=/etc/fedllm/site.toml "))[0]
        for _, file, text in steps()
        if not file
    }
    assert first == {"fedllm", "install", "runuser", *LEFT_OUT}


@pytest.mark.soak
def test_three_machines_from_nothing(make_model_folder, text_file, tmp_path):
    superlink_port = free_port()
    proxied = free_port() if "nginx" in installed() else superlink_port
    machines = {}
    for name in ("server", "a", "b"):
        (tmp_path / name).mkdir()
        machines[name] = Machine(name, tmp_path / name, proxied)
    server, model = machines["server"], make_model_folder()
    rows = text_file.read_text().splitlines(keepends=True)
    told: dict[str, str] = {}
    with ExitStack() as running:
        for name, file, line in steps():
            machine, text = machines[name], line.removeprefix("runuser -u fedllm -- ")
            words = shlex.split(text) if not file else []
            if file:
                path = Path(machine.here(file))
                values = tomllib.loads(machine.here(text))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(tomli_w.dumps(fitted(path, values, model, told)))
            elif words[0] in LEFT_OUT:
                continue
            elif words[0] == "install":
                subprocess.run(shlex.split(machine.here(text)), check=True)
            elif words[:2] == ["fedllm", "serve"]:
                for other in ("a", "b"):  # what the page has people carry from machine to machine
                    public = Path(machines[other].here("/etc/fedllm/node.key.pub"))
                    public.rename(server.here(f"/etc/fedllm/hospital-{other}.pub"))
                command = [*shlex.split(server.here(text)), "--port", str(superlink_port)]
                environment = flower_environment(server.folder / "flower") | {"FEDLLM_SITE": ""}
                serving = running.enter_context(process(command, server.folder, environment, "serve"))
                credentials = Credentials(Path(server.here("/etc/fedllm/credentials")))
                link = Link(server.folder, superlink_port, credentials)
                if proxied != superlink_port:
                    running.enter_context(front("nginx", server.folder / "front", link, credentials, proxied))
            elif words[:3] == ["fedllm", "site", "start"]:
                command = shlex.split(machine.here(text))
                environment = flower_environment(machine.folder / "flower") | {"FEDLLM_SITE": ""}
                running.enter_context(process(command, machine.folder, environment, "site"))
            elif words[:3] == ["fedllm", "keys", "admit"]:
                ends = time.monotonic() + 60
                while not link.is_open():
                    assert serving.poll() is None, (server.folder / "serve.log").read_text()
                    assert time.monotonic() < ends, "no SuperLink"
                    time.sleep(0.1)
                server.run(text, "--port", str(superlink_port))
            else:
                told[name] = told.get(name, "") + machine.run(text)
            if words[:3] == ["fedllm", "keys", "node"]:  # the machine is a folder from here on
                data = Path(machine.here("/srv/fedllm"))
                data.mkdir(exist_ok=True)
                (data / "letters.jsonl").write_text("".join(rows[("ab".index(name)) :: 2]))
                shutil.copy(server.here("/etc/fedllm/credentials/ca.crt"), machine.here("/etc/fedllm/ca.crt"))
        assert serving.wait(600) == 0, (server.folder / "serve.log").read_text()
    folder = Path(server.here("/var/lib/fedllm/runs/hospitals"))
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert lines[-1]["accepted"] == ["hospital-a", "hospital-b"]
    for name in ("a", "b"):
        assert "evaluate" in told[name], "doctor says what will leave"
