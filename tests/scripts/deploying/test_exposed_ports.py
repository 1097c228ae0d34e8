"""What a process without credentials gets from each port of a deployment that it can reach: nothing.

A real SuperLink with its SuperExec, a SuperNode, and the proxies of docs/deploy in front.
"""

import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPSConnection

import httpx
import pytest

from fedllm.site_policy import load_policy
from scripts.deploying.certificates import new_credentials, new_node_key
from scripts.deploying.refusals import why_a_node_ended
from scripts.runtimes.processes import (
    Link,
    free_port,
    process,
    register,
    superexec,
    superlink,
    temporary_link,
)
from scripts.runtimes.site import running_site
from tests.fronts import FRONTS, front, installed
from tests.site_builder import write_site

pytestmark = pytest.mark.slow
# The last one travels on as what it comes to.
FLEET = """
activate-node pull-messages get-run get-fab push-messages pull-object register-node
../control/list-nodes/../../fleet/get-run
"""
# In the last three lines ways around a proxy that compares another path than the SuperLink does.
CLOSED = """
/v1/control/start-run /v1/control/list-nodes /v1/control/register-node /v1/control/stream-logs
/v1/runtime/acquire-task /v1/runtime/pull-task-input /docs /openapi.json / /v1/fleet/
/v1/fleet/../control/list-nodes /v1/fleet/..%2fcontrol/list-nodes /v1/fleet/%2e%2e/control/list-nodes
//v1/control/list-nodes /v1/fleet//../control/list-nodes /v1/fleet/get-run/../../control/list-nodes
/v1/fleet;/../control/list-nodes /V1/control/list-nodes
"""


@dataclass(frozen=True)
class Deployment:
    """One that runs: its SuperLink, and the ports in front of it by name."""

    link: Link
    ports: dict[str, int]


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with ExitStack() as stack:
        link = stack.enter_context(temporary_link(is_hardened=True))
        assert link.credentials
        stack.enter_context(superlink(link))
        stack.enter_context(superexec(link))
        expired = shutil.copytree(link.credentials.folder, link.folder / "expired")
        own = dict.fromkeys(installed(), link.credentials)
        own |= {"expired": new_credentials(expired, [], timedelta(hours=-1))} if "nginx" in own else {}
        ports = {}
        for name, credentials in own.items():
            program = "nginx" if name == "expired" else name
            ports[name] = stack.enter_context(
                front(program, link.folder / f"front-{name}", link, credentials)
            )
        yield Deployment(link, ports)


def post(deployment: Deployment, port: int, path: str, method: str = "POST") -> tuple[int, str]:
    """Send an empty message to a path as it is written, which httpx would tidy; return status and text."""
    trust = ssl.create_default_context(cafile=str(deployment.link.credentials.authority))
    connection = HTTPSConnection("127.0.0.1", port, context=trust)
    with closing(connection):
        connection.request(method, path, b"", {"Content-Type": "application/protobuf"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


@pytest.mark.parametrize("name", FRONTS)
def test_proxy_lets_through_what_a_supernode_needs_alone(name, deployment):
    if name not in deployment.ports:
        pytest.skip(f"{name} is not installed")
    port = deployment.ports[name]
    answers = {path: post(deployment, port, path) for path in CLOSED.split()}
    # The SuperLink's own words begin with {"detail" or are protobuf; the proxy's are a page or nothing.
    assert not {path: answer for path, answer in answers.items() if answer[0] not in (400, 404)}
    assert not {path: answer for path, answer in answers.items() if "detail" in answer[1]}
    assert post(deployment, port, "/v1/fleet/get-run", "GET")[0] in (403, 404)
    assert post(deployment, deployment.link.port, "/v1/control/list-nodes")[0] == 200, (
        "it is there to be hidden"
    )


@pytest.mark.parametrize("name", FRONTS)
def test_fleet_without_a_registered_key_gives_nothing(name, deployment):
    if name not in deployment.ports:
        pytest.skip(f"{name} is not installed")
    for path in FLEET.split():
        status, text = post(deployment, deployment.ports[name], f"/v1/fleet/{path}")
        assert (status, "Invalid SuperNode authentication" in text) == (401, True), (path, text)


def test_runtime_without_the_secret_gives_no_task(deployment):
    for path in ("acquire-task", "pull-task-input", "pull-object", "create-task", "push-task-output"):
        assert post(deployment, deployment.link.port, f"/v1/runtime/{path}")[0] == 401, path


def test_site_gives_nothing_on_its_two_doors(deployment, tmp_path):
    link = deployment.link
    assert link.credentials
    register(link, new_node_key(tmp_path / "asked.key"))
    node = {"root-certificates": str(link.credentials.authority), "private-key": str(tmp_path / "asked.key")}
    policy = load_policy(write_site(tmp_path, link.address, {"asked": node}))
    with running_site(policy) as site:
        log, ends = site.logs / "node-asked.log", time.monotonic() + 60
        while "running on http://" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < ends, "no SuperNode"
            time.sleep(0.1)
        address = log.read_text().split("running on ")[1].split()[0]
        headers = {"Content-Type": "application/protobuf"}
        with httpx.Client(trust_env=False) as client:
            for path in ("acquire-task", "pull-task-input", "pull-object"):
                assert client.post(f"{address}/v1/runtime/{path}", headers=headers).status_code == 401, path
        door = httpx.HTTPTransport(uds=str(site.socket))
        headers = {"fedllm-protocol": "1", "authorization": "Bearer guessed"}
        with httpx.Client(transport=door, base_url="http://site", timeout=60) as client:
            for path in ("ticket", "answer"):
                answer = client.post(f"/v1/{path}", headers=headers, json={"bundle": "0" * 64, "version": ""})
                assert answer.is_error, answer.text


def skewed(seconds: str) -> dict[str, str]:
    """Return the environment of a process whose clock is wrong."""
    told = subprocess.run(
        ["faketime", "-f", seconds, "env"], capture_output=True, text=True, check=True
    ).stdout
    return dict(
        line.split("=", 1) for line in told.splitlines() if line.startswith(("LD_PRELOAD=", "FAKETIME"))
    )


def test_refused_node_says_why_in_one_line(deployment, tmp_path):
    if "expired" not in deployment.ports:
        pytest.skip("nginx is not installed")
    link = deployment.link
    assert link.credentials
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    register(link, new_node_key(known))
    register(link, known.with_name("known.pub"))  # again: it stays admitted
    new_node_key(unknown)
    foreign = new_credentials(tmp_path / "foreign", []).authority
    ours, port = link.credentials.authority, deployment.ports["nginx"]
    tried = {
        "not registered": (ours, unknown, port, {}),
        "not signed by the authority": (foreign, known, port, {}),
        "has expired": (ours, known, deployment.ports["expired"], {}),
    }
    if shutil.which("faketime"):
        tried["within five minutes"] = (ours, known, port, skewed("+400s"))
    with ExitStack() as stack:
        started = {}
        for number, (cause, (trusted, key, there, clock)) in enumerate(tried.items()):
            command = ["flower-supernode", "--root-certificates", str(trusted), "--port", str(free_port())]
            command += ["--superlink", f"127.0.0.1:{there}", "--auth-supernode-private-key", str(key)]
            command += ["--isolation", "process"]
            name = f"refused-{number}"
            running = process(command, link.folder, link.environment(name) | clock, name)
            started[cause] = (stack.enter_context(running), name)
        for cause, (running, name) in started.items():
            running.wait(60)
            line = why_a_node_ended((link.folder / f"{name}.log").read_text())
            assert cause in line
            assert "\n" not in line
