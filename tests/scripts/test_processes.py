"""What Flower's processes are refused for before they start, and what they leave."""

import os
import socket
import sys
from pathlib import Path

import pytest

from fedllm.errors import RunFailedError
from scripts.runtimes import processes
from scripts.runtimes.processes import Link, end_session, start_guarded, superlink


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(RunFailedError, match=f"port {port} .* is taken") as caught,
            superlink(Link(tmp_path, port)),
        ):
            pass
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "superlink.log").exists()


def test_a_log_is_private_bounded_and_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LARGEST_LOG", 3)
    log = tmp_path / "node.log"

    def start() -> None:
        running = start_guarded([sys.executable, "-c", "print('here')"], tmp_path, os.environ, log)
        running.wait()
        end_session(running)

    start()
    assert log.stat().st_mode & 0o077 == 0
    start()
    assert log.read_text() == (tmp_path / "node.log.old").read_text() == "here\n"
    log.unlink()
    log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        start()
    assert not (tmp_path / "elsewhere").exists()
