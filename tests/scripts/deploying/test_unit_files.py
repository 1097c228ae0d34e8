"""The files of docs/deploy that no test here can run: parsed, and compared with what they promise."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from scripts.cli import app

DEPLOY = Path(__file__).parents[3] / "docs" / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
MANIFESTS = sorted((DEPLOY / "kubernetes").iterdir())
PORT = 8443  # the proxy's, the only one that is open to a network


def compose(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((DEPLOY / f"compose.{name}.yaml").read_text())
    return parsed


def pods() -> Iterator[dict[str, Any]]:
    for file in MANIFESTS:
        for found in yaml.safe_load_all(file.read_text()):
            if found["kind"] in ("Job", "Deployment"):
                yield found["spec"]["template"]["spec"]


def containers() -> Iterator[dict[str, Any]]:
    for pod in pods():
        yield from [*pod["initContainers"], *pod["containers"]]


def commands() -> Iterator[list[str]]:
    """Return what each file makes `fedllm` do."""
    for unit in UNITS:
        (line,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
        yield line.split()[1:]
    for name in ("server", "site"):
        yield compose(name)["services"][name]["command"]
    for pod in pods():
        yield from (container["args"] for container in pod["containers"])


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_are_what_the_command_line_takes(words):
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    with command.make_context("fedllm", list(words)):  # parses, and runs nothing
        pass


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit(unit, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/fedllm/bin/fedllm", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_kubectl_reads_the_manifests(tmp_path):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    for file in MANIFESTS:
        shutil.copy(file, tmp_path)
    resources = {"resources": [file.name for file in MANIFESTS]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(resources))
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, check=True)
    assert len(list(yaml.safe_load_all(done.stdout))) == 7


def test_the_proxys_port_alone_is_open():
    assert compose("server")["services"]["proxy"]["ports"] == [f"{PORT}:{PORT}"]
    assert "ports" not in compose("server")["services"]["server"] | compose("site")["services"]["site"]
    ports = [port["containerPort"] for container in containers() for port in container.get("ports", [])]
    assert ports == [PORT]
    assert f"listen {PORT} ssl" in (DEPLOY / "nginx.conf").read_text()
    assert f":{PORT} {{" in (DEPLOY / "Caddyfile").read_text()


def test_containers_may_do_as_little_as_they_need():
    for pod in pods():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
    for container in containers():
        narrow = container["securityContext"]
        assert narrow["allowPrivilegeEscalation"] is False
        assert narrow["readOnlyRootFilesystem"] is True
        assert narrow["capabilities"] == {"drop": ["ALL"]}
    for service in (*compose("server")["services"].values(), *compose("site")["services"].values()):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
