"""A TCP proxy on loopback that records what passes, and delays, slows or cuts it."""

import asyncio
import math
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_PIECE = 65536  # bytes read at once
_AT_ONCE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Trouble:
    """What happens to each connection. `delay` is in seconds for each piece read, `rate` in bytes a second.

    After `cut_after` bytes, both directions together, a connection is reset. Where `is_stalled`, nothing
    passes and nothing is closed, as with a machine that hangs.
    """

    delay: float = 0.0
    rate: float = math.inf
    cut_after: float = math.inf
    is_stalled: bool = False


@dataclass(eq=False)
class Proxy:
    """A proxy at work. `trouble` may be replaced at any time, and holds from the next piece on."""

    port: int
    trouble: Trouble
    streams: list[bytearray] = field(default_factory=list)  # two a connection: from the client, to the client
    num_connections: int = 0
    num_cut: int = 0

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"


@contextmanager
def proxy(
    target: int,
    trouble: Trouble = Trouble(),
    *,
    accept: ssl.SSLContext | None = None,
    connect: ssl.SSLContext | None = None,
) -> Iterator[Proxy]:
    """Run a proxy to a loopback port for the length of the block, in a thread of its own.

    With `accept` it speaks TLS to its clients, with `connect` to the target, and records what is inside.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    running = Proxy(listening.getsockname()[1], trouble)
    loop = asyncio.new_event_loop()
    is_over = asyncio.Event()
    thread = threading.Thread(
        target=loop.run_until_complete, args=[_serve(running, listening, target, accept, connect, is_over)]
    )
    thread.start()
    try:
        yield running
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join()
        loop.close()


async def _serve(
    proxy: Proxy,
    listening: socket.socket,
    target: int,
    accept: ssl.SSLContext | None,
    connect: ssl.SSLContext | None,
    is_over: asyncio.Event,
) -> None:
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        connections.add(task)
        task.add_done_callback(connections.discard)
        with suppress(OSError, asyncio.CancelledError):
            await _connection(proxy, reader, writer, target, connect)
        writer.transport.abort()

    server = await asyncio.start_server(connected, sock=listening, ssl=accept)
    await is_over.wait()
    server.close()
    for task in tuple(connections):
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


async def _connection(
    proxy: Proxy,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    target: int,
    connect: ssl.SSLContext | None,
) -> None:
    """Pass on both directions until both have ended, or either fails."""
    name = "localhost" if connect else None
    far_reader, far_writer = await asyncio.open_connection(
        "127.0.0.1", target, ssl=connect, server_hostname=name
    )
    proxy.num_connections += 1
    pair = bytearray(), bytearray()
    proxy.streams += pair
    ends = writer, far_writer
    ways = [(reader, far_writer, pair[0]), (far_reader, writer, pair[1])]
    tasks = [asyncio.ensure_future(_pass(proxy, *way, pair, ends)) for way in ways]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        far_writer.transport.abort()


async def _pass(
    proxy: Proxy,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    seen: bytearray,
    pair: tuple[bytearray, bytearray],
    ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
) -> None:
    """Pass on one direction until it ends.

    Raises:
        ConnectionResetError: it is time to cut the connection.
    """
    while piece := await reader.read(_PIECE):
        while proxy.trouble.is_stalled:
            await asyncio.sleep(0.05)
        await asyncio.sleep(proxy.trouble.delay + len(piece) / proxy.trouble.rate)
        left = proxy.trouble.cut_after - len(pair[0]) - len(pair[1])
        passed = piece if len(piece) <= left else piece[: int(left)]
        seen += passed
        writer.write(passed)
        await writer.drain()
        if len(passed) < len(piece):
            proxy.num_cut += 1
            for end in ends:  # closed with a reset, as a connection that breaks
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            raise ConnectionResetError
    if writer.can_write_eof():  # TLS cannot close one direction alone
        writer.write_eof()
