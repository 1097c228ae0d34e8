"""A site's service: the process that owns rows, base model, keys and state, and answers for its nodes.

It listens on a Unix socket that the site's starter has opened (`fedllm site start`), and answers one question
at a time, so that one GPU serves several nodes; the others wait in order. The base model stays loaded until
nothing has been asked for `[site] idle-minutes`. Who asks follows from a ticket (`clients.tickets`); what a
node is, and what it may be asked, from this machine's site.toml alone.
"""

import asyncio
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from flwr.app import Context, Message, RecordDict
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import fedllm
from clients.answering import answer
from clients.gate import Sender, note_refused
from clients.process import Process
from clients.retention import remove_ended
from clients.site_protocol import HEADERS, KEYS, PROTOCOL, Carried, check_version, read_question, write_reply
from clients.tickets import Tickets
from fedllm.engine.interruption import watched_steps
from fedllm.errors import CancelledError, FedLLMError, OtherVersionError, PolicyError
from fedllm.site_policy import load_policy

_TELL_SECONDS = 1.0  # between two lines of progress
_REMOVE_SECONDS = 3600.0  # between two looks at what ended runs have left
_CLOSING_SECONDS = 5
_LARGEST_QUESTION = 2**33
_DIGEST_LENGTH = 64  # SHA-256, in hexadecimal

_logger = logging.getLogger("fedllm.site")


@dataclass(eq=False)
class Work:
    """One question on its way: how far it is, and whether anybody still waits for its answer."""

    step: int = 0
    num_steps: int = 0
    has_begun: bool = False
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    def watch(self, num_done: int, num_steps: int) -> None:
        """Note how far training is, and end it where nobody waits any more."""
        self.step, self.num_steps = num_done, num_steps
        if self.is_cancelled.is_set():
            raise CancelledError(
                f"nobody waits for the answer; stopped before step {num_done + 1} of {num_steps}"
            )


class Service:
    """Answers questions, one at a time."""

    def __init__(self, process: Process, tickets: Tickets) -> None:
        self.process = process
        self.tickets = tickets
        self._worker = ThreadPoolExecutor(1, "answers")
        self._works: list[Work] = []  # in the order they came; all but the first wait
        self._states: dict[tuple[str, int], RecordDict] = {}  # of Flower's contexts, by node and run
        self._last_used = time.monotonic()
        self._is_unloaded = True

    # --- in the worker's thread ---------------------------------------------------------------------------

    def _answer(self, asked: Carried, sender: Sender, work: Work) -> Message:
        work.has_begun = True
        work.watch(0, 0)  # it may have been given up while it waited
        with _refusal_noted(sender):
            node_config = load_policy().node_config(sender.node)
        context = Context(
            run_id=asked.run_id,
            node_id=asked.node_id,
            node_config={**node_config},
            state=self._states.setdefault((sender.node, asked.run_id), RecordDict()),
            run_config=dict(asked.run_config),
        )
        with watched_steps(work.watch):
            return answer(self.process, asked.message, context, sender)

    # --- in the event loop --------------------------------------------------------------------------------

    async def replies(self, asked: Carried, sender: Sender) -> AsyncIterator[bytes]:
        """Yield lines of progress and then the reply; that nobody reads on ends the work."""
        work = Work()
        self._works.append(work)
        self._is_unloaded = False
        done = asyncio.wrap_future(self._worker.submit(self._answer, asked, sender, work))
        try:
            while not done.done():
                yield _line(self._progress(work))
                await asyncio.wait([done], timeout=_TELL_SECONDS)
            for part in _parts_of(done):
                yield part
        finally:
            work.is_cancelled.set()
            done.cancel()
            self._works.remove(work)
            self._last_used = time.monotonic()

    def _progress(self, work: Work) -> dict[str, int]:
        if not work.has_begun:
            return {"waiting": self._works.index(work)}
        return {"step": work.step, "of": work.num_steps}

    def health(self) -> dict[str, Any]:
        """Return what the service is doing."""
        return {
            "protocol": PROTOCOL,
            "version": fedllm.__version__,
            "answering": sum(work.has_begun for work in self._works),
            "waiting": sum(not work.has_begun for work in self._works),
            "is-unloaded": self._is_unloaded,
        }

    async def unload_when_idle(self, idle_seconds: Callable[[], float]) -> None:
        """Let go of the base model whenever nothing has been asked for so long."""
        while True:
            idle = time.monotonic() - self._last_used
            if not self._works and not self._is_unloaded and idle >= idle_seconds():
                # In the worker's thread: a question that comes now waits for it.
                await asyncio.wrap_future(self._worker.submit(self.process.release))
                self._is_unloaded = not self._works
                _logger.info("nothing was asked for %.0f s: the base model is unloaded", idle)
            await asyncio.sleep(min(_TELL_SECONDS, max(0.05, idle_seconds() / 10)))

    async def remove_ended(self) -> None:
        """Remove now and then what ended runs have left, as long as the owner wants."""
        while True:
            with suppress(FedLLMError, OSError):  # what cannot be read now is looked at again later
                policy = load_policy()
                if days := policy.site.keep_days:
                    work = self._worker.submit(remove_ended, policy.state_folder, days, time.time())
                    for name in await asyncio.wrap_future(work):
                        _logger.info(
                            "%s: nothing changed for %g days, so its private vectors are removed", name, days
                        )
            await asyncio.sleep(_REMOVE_SECONDS)

    def cancel(self) -> None:
        """Give up all questions."""
        for work in self._works:
            work.is_cancelled.set()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _parts_of(done: "asyncio.Future[Message]") -> tuple[bytes, ...]:
    """Return the end of an answer: a reply, or a code."""
    try:
        reply = done.result()
    except FedLLMError as error:
        _logger.error("%s: %s", error.code, error)
        return (_line({"refused": error.code}),)
    if reply.has_error():
        return (_line({"refused": reply.error.reason}),)
    data = write_reply(reply.content)
    return _line({"reply": len(data)}), data


# --- HTTP --------------------------------------------------------------------------------------------------


def make_site_app(service: Service) -> Starlette:
    """Return the service's HTTP side."""

    def token_of(request: Request) -> str:
        check_version(request.headers)
        return request.headers.get("authorization", "").removeprefix("Bearer ")

    async def ticket(request: Request) -> Response:
        node = service.tickets.node_of(token_of(request))
        if node is None:
            return _refusal("site-away", "this launch key is of none of the site's nodes", 401)
        told = await request.json()
        bundle = str(told["bundle"])[:_DIGEST_LENGTH]
        sender = Sender(server=load_policy().nodes[node].superlink, node=node, bundle=bundle)
        with _refusal_noted(sender):
            check_bundle(sender, str(told["version"]))
        return JSONResponse({"ticket": service.tickets.issue(sender)})

    async def ask(request: Request) -> Response:
        sender = service.tickets.redeem(token_of(request))
        if sender is None:
            return _refusal("site-away", "this ticket is not one of the service's, or was used", 401)
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > _LARGEST_QUESTION:
                return _refusal("bad-packet", "the question is too large", 413)
        with _refusal_noted(sender):
            question = read_question(bytes(data))
        return StreamingResponse(service.replies(question, sender))

    async def health(request: Request) -> Response:
        return JSONResponse(service.health())

    routes = [
        Route("/v1/ticket", ticket, methods=["POST"]),
        Route("/v1/answer", ask, methods=["POST"]),
        Route("/v1/health", health),
    ]
    return Starlette(routes=routes, exception_handlers={FedLLMError: _refused})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, FedLLMError)
    _logger.error("%s: %s", error.code, error)
    return _refusal(error.code, str(error), 403)


def _refusal(code: str, why: str, status: int) -> Response:
    return JSONResponse({"refused": code, "why": why}, status_code=status, headers=HEADERS)


@contextmanager
def _refusal_noted(sender: Sender) -> Iterator[None]:
    """Have the site's log name whoever is refused in the block, before there is a question to log."""
    try:
        yield
    except FedLLMError as error:
        note_refused(sender, error.code)
        raise


def check_bundle(sender: Sender, version: str) -> None:
    """Let a bundle through whose messages this site answers.

    Raises:
        PolicyError: the owner has named bundles, and it is none of them.
        OtherVersionError: it is fedllm's, of another version than this site's.
    """
    policy = load_policy()
    allowed = policy.allow.bundle_digests
    if allowed and sender.bundle not in allowed:
        raise PolicyError(
            f"{policy.file}: [allow] bundles does not name {sender.bundle}, which {sender.server} has sent"
        )
    if version not in ("", fedllm.__version__):
        raise OtherVersionError(
            f"{sender.server} runs fedllm {version[:32]!r}, this site {fedllm.__version__}; install one"
            " version"
        )


# --- the process -------------------------------------------------------------------------------------------


def main(words: list[str]) -> None:
    """Serve on the open socket whose number the first word is, until a signal or the starter's end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    nodes = json.loads(os.environ.pop(KEYS))  # so that nothing started from here inherits it
    listening = socket.socket(fileno=int(words[0]))
    service = Service(Process(), Tickets(nodes))
    asyncio.run(serve(make_server(service), service, listening))
    os._exit(0)  # a step of the engine may still run, and nothing of it is wanted


def make_server(service: Service) -> uvicorn.Server:
    """Return the server of a service, which ends a few seconds after it is told to."""
    return uvicorn.Server(
        uvicorn.Config(
            make_site_app(service),
            log_level="warning",
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
    )


async def serve(server: uvicorn.Server, service: Service, listening: socket.socket) -> None:
    """Serve until the server is told to exit; what is being answered then is given up."""
    idle = asyncio.create_task(service.unload_when_idle(lambda: load_policy().site.idle_minutes * 60))
    removing = asyncio.create_task(service.remove_ended())
    _logger.info("answers for %s", ", ".join(sorted(load_policy().nodes)) or "no node")
    with suppress(asyncio.CancelledError):
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not serving.done():
            await asyncio.wait([serving], timeout=0.2)
            if server.should_exit:
                service.cancel()
    idle.cancel()
    removing.cancel()


if __name__ == "__main__":
    main(sys.argv[1:])
