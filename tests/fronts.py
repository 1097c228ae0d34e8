"""The proxies of docs/deploy, run with their files as they stand there but for names of files and ports."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.deploying.certificates import Credentials
from scripts.runtimes.processes import Link, free_port

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"


def _nginx_command(folder: Path, config: str) -> list[str]:
    (folder / "fedllm.conf").write_text(config)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log stderr warn; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;"
        f" fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;"
        f" include {folder}/fedllm.conf; }}\n"
    )
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def _caddy_command(folder: Path, config: str) -> list[str]:
    (folder / "Caddyfile").write_text(config)
    return ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


FRONTS = {"nginx": ("nginx.conf", _nginx_command), "caddy": ("Caddyfile", _caddy_command)}


def installed() -> list[str]:
    """Return the proxies that this machine has."""
    return [name for name in FRONTS if shutil.which(name)]


@contextmanager
def front(name: str, folder: Path, link: Link, own: Credentials, port: int = 0) -> Iterator[int]:
    """Run a proxy in a new folder before `link`, with a certificate of its `own`; yield its port."""
    if name not in installed():
        pytest.skip(f"{name} is not installed")
    assert link.credentials
    file, command = FRONTS[name]
    port = port or free_port()
    config = (DEPLOY / file).read_text()
    # The SuperLink's authority, also where the proxy's own certificate is another's.
    config = config.replace("/etc/fedllm/credentials/ca.crt", str(link.credentials.authority))
    config = config.replace("/etc/fedllm/credentials", str(own.folder))
    config = config.replace("8443", f"{port}").replace("127.0.0.1:8000", link.address)
    folder.mkdir()
    environment = {"HOME": str(folder), "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/bin"}
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
