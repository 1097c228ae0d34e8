"""What a process without credentials gets from each port of a deployment that it can reach: nothing.

A real SuperLink with its SuperExec, a SuperNode, and the proxies of docs/deploy in front.
"""

import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPSConnection
from pathlib import Path

import httpx
import pytest

from scripts.deploying.certificates import new_credentials, new_node_key
from scripts.deploying.refusals import why_a_node_ended
from scripts.runtimes.processes import (
    Link,
    free_port,
    process,
    register,
    superexec,
    superlink,
    supernode,
    temporary_link,
)

pytestmark = pytest.mark.slow
DEPLOY = Path(__file__).parents[3] / "docs" / "deploy"
FLEET = (
    *(
        "activate-node",
        "pull-messages",
        "get-run",
        "get-fab",
        "push-messages",
        "pull-object",
        "register-node",
    ),
    "../control/list-nodes/../../fleet/get-run",  # travels on as what it comes to
)
CLOSED = (
    *(
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/control/register-node",
        "/v1/control/stream-logs",
    ),
    *("/v1/runtime/acquire-task", "/v1/runtime/pull-task-input", "/docs", "/openapi.json", "/", "/v1/fleet/"),
    # Ways around a proxy that compares another path than the SuperLink does.
    *(
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/..%2fcontrol/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
    ),
    *(
        "//v1/control/list-nodes",
        "/v1/fleet//../control/list-nodes",
    ),
    *(
        "/v1/fleet/get-run/../../control/list-nodes",
        "/v1/fleet;/../control/list-nodes",
        "/V1/control/list-nodes",
    ),
)


def nginx_command(folder: Path, config: str) -> list[str]:
    (folder / "site.conf").write_text(config)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log stderr warn; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;"
        f" fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;"
        f" include {folder}/site.conf; }}\n"
    )
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy_command(folder: Path, config: str) -> list[str]:
    (folder / "Caddyfile").write_text(config)
    return ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


PROXIES = {"nginx": ("nginx.conf", nginx_command), "caddy": ("Caddyfile", caddy_command)}


@contextmanager
def proxy(name: str, link: Link, credentials: Path) -> Iterator[int]:
    """Run a proxy with its file of docs/deploy, but for names of files and ports; yield the port."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    assert link.credentials
    file, command = PROXIES[name]
    port = free_port()
    config = (DEPLOY / file).read_text()
    # A SuperLink's authority stays that of the SuperLink where the proxy's own certificate is another.
    config = config.replace("/etc/fedllm/credentials/ca.crt", str(link.credentials.authority))
    config = config.replace("/etc/fedllm/credentials", str(credentials))
    config = config.replace("8443", f"{port}").replace("127.0.0.1:8000", link.address)
    folder = link.folder / f"{name}-{port}"
    folder.mkdir()
    environment = {"HOME": str(folder), "PATH": "/usr/sbin:/usr/bin:/bin"}
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(command(folder, config), env=environment, stdout=log, stderr=log)
    try:
        ends = time.monotonic() + 20
        while not Link(folder, port).is_open():
            assert running.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < ends, (folder / "log").read_text()
            time.sleep(0.05)
        yield port
    finally:
        running.terminate()
        running.wait(20)


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
        new_credentials(expired, [], timedelta(hours=-1))
        ports = {
            name: stack.enter_context(proxy(name, link, link.credentials.folder))
            for name in PROXIES
            if shutil.which(name)
        }
        if "nginx" in ports:
            ports["expired"] = stack.enter_context(proxy("nginx", link, expired))
        yield Deployment(link, ports)


def post(deployment: Deployment, port: int, path: str, method: str = "POST") -> tuple[int, str]:
    """Send an empty message to a path as it is written, which httpx would tidy; return status and text."""
    trust = ssl.create_default_context(cafile=str(deployment.link.credentials.authority))
    connection = HTTPSConnection("127.0.0.1", port, context=trust)
    with closing(connection):
        connection.request(method, path, b"", {"Content-Type": "application/protobuf"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


@pytest.mark.parametrize("name", PROXIES)
def test_proxy_lets_through_what_a_supernode_needs_alone(name, deployment):
    if name not in deployment.ports:
        pytest.skip(f"{name} is not installed")
    port = deployment.ports[name]
    answers = {path: post(deployment, port, path) for path in CLOSED}
    # The SuperLink's own words begin with {"detail" or are protobuf; the proxy's are a page or nothing.
    assert not {path: answer for path, answer in answers.items() if answer[0] not in (400, 404)}
    assert not {path: answer for path, answer in answers.items() if "detail" in answer[1]}
    assert post(deployment, port, "/v1/fleet/get-run", "GET")[0] in (403, 404)
    assert post(deployment, deployment.link.port, "/v1/control/list-nodes")[0] == 200, (
        "it is there to be hidden"
    )


@pytest.mark.parametrize("name", PROXIES)
def test_fleet_without_a_registered_key_gives_nothing(name, deployment):
    if name not in deployment.ports:
        pytest.skip(f"{name} is not installed")
    for path in FLEET:
        status, text = post(deployment, deployment.ports[name], f"/v1/fleet/{path}")
        assert (status, "Invalid SuperNode authentication" in text) == (401, True), (path, text)


def test_runtime_without_the_secret_gives_no_task(deployment):
    for path in ("acquire-task", "pull-task-input", "pull-object", "create-task", "push-task-output"):
        assert post(deployment, deployment.link.port, f"/v1/runtime/{path}")[0] == 401, path


def test_nodes_runtime_port_gives_nothing_either(deployment):
    with supernode(deployment.link, "asked", {}), httpx.Client(trust_env=False) as client:
        log, ends = deployment.link.folder / "asked.log", time.monotonic() + 60
        while "running on http://" not in log.read_text():
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
        address = log.read_text().split("running on ")[1].split()[0]
        for path in ("acquire-task", "pull-task-input", "pull-object"):
            headers = {"Content-Type": "application/protobuf"}
            assert client.post(f"{address}/v1/runtime/{path}", headers=headers).status_code == 401, path


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
        "not registered": (ours, unknown, port),
        "not signed by the authority": (foreign, known, port),
        "has expired": (ours, known, deployment.ports["expired"]),
    }
    with ExitStack() as stack:
        started = {}
        for number, (cause, (trusted, key, there)) in enumerate(tried.items()):
            command = ["flower-supernode", "--root-certificates", str(trusted), "--port", str(free_port())]
            command += ["--superlink", f"127.0.0.1:{there}", "--auth-supernode-private-key", str(key)]
            command += ["--isolation", "process"]
            name = f"refused-{number}"
            running = process(command, link.folder, link.environment(name), name)
            started[cause] = (stack.enter_context(running), name)
        for cause, (running, name) in started.items():
            assert running.wait(60) != 0
            line = why_a_node_ended((link.folder / f"{name}.log").read_text())
            assert cause in line
            assert "\n" not in line
