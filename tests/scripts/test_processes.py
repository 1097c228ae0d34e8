"""What Flower's processes are refused for before they start."""

import socket
from pathlib import Path

import pytest

from fedllm.errors import RunFailedError
from scripts.runtimes.processes import Link, superlink


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
