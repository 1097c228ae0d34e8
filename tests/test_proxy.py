"""The proxy of the tests passes on, records, slows and cuts as it says."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.proxy import Trouble, proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while content := connection.recv(65536):
                    connection.sendall(content)
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=[connection], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def said(port: int, content: bytes) -> bytes:
    """Send everything, then return everything that comes back."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        threading.Thread(target=lambda: _send(connection, content), daemon=True).start()
        found = b""
        while piece := connection.recv(65536):
            found += piece
        return found


def _send(connection: socket.socket, content: bytes) -> None:
    try:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return


def test_both_directions_pass_and_are_recorded(echo: int) -> None:
    content = bytes(range(256)) * 2000
    with proxy(echo) as between:
        assert said(between.port, content) == content
        assert said(between.port, b"again") == b"again"
    assert between.streams == [content, content, b"again", b"again"]
    assert (between.num_connections, between.num_cut) == (2, 0)


def test_a_connection_is_cut_at_its_byte(echo: int) -> None:
    with proxy(echo, Trouble(cut_after=1000)) as between:
        with pytest.raises(ConnectionError):
            said(between.port, bytes(3000))
        between.trouble = Trouble()
        assert said(between.port, b"whole") == b"whole"
    assert between.num_cut == 1
    assert all(len(up) + len(down) <= 1000 for up, down in zip(*[iter(between.streams)] * 2, strict=True))


def test_a_slow_link_takes_its_time(echo: int) -> None:
    with proxy(echo, Trouble(rate=100_000, delay=0.1)) as between:
        begun = time.monotonic()
        assert said(between.port, bytes(20_000)) == bytes(20_000)
        assert time.monotonic() - begun >= 0.6  # 0.2 s and a delay, each way


def test_a_stalled_link_goes_on_where_it_stopped(echo: int) -> None:
    with proxy(echo, Trouble(is_stalled=True)) as between:
        found: list[bytes] = []
        waiting = threading.Thread(target=lambda: found.append(said(between.port, b"late")))
        waiting.start()
        waiting.join(0.5)
        assert found == []
        between.trouble = Trouble()
        waiting.join(10)
    assert found == [b"late"]
