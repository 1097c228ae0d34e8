"""A messenger: carries one message from Flower to the site's service, and the reply back.

It has neither torch nor the right to read data, model, keys or state. That it ends is how the service learns
that nobody waits any more.
"""

import json
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from flwr.app import Context, Message

from clients.site_protocol import HEADERS, SOCKET, TICKET, Carried, read_reply, write_question
from fedllm.errors import FedLLMError, SiteAwayError
from fedllm.wire.refusals import refusal

WAIT_SECONDS = 30.0  # for a service that starts, or starts again
_SILENCE_SECONDS = 60.0  # a service that works says so every second
_PROGRESS_SECONDS = 5.0

_logger = logging.getLogger("fedllm.messenger")


def carry(message: Message, context: Context, variables: Mapping[str, str]) -> Message:
    """Return the site's reply to a message, or a refusal with the code of what went wrong here."""
    asked = Carried(
        message=message, run_id=context.run_id, node_id=context.node_id, run_config=context.run_config
    )
    try:
        with connected(variables[SOCKET]) as service:
            code, data = _answer(service, write_question(asked), variables.get(TICKET, ""))
    except FedLLMError as error:
        _logger.error("%s: %s", error.code, error)
        return refusal(message, error.code)
    return refusal(message, code) if code else Message(read_reply(data), reply_to=message)


def connected(path: str, patience: float | None = None) -> httpx.Client:
    """Return a client of the service that listens at a socket, once it does.

    Raises:
        SiteAwayError: nobody listens there within `patience` seconds, else within `WAIT_SECONDS`.
    """
    patience = WAIT_SECONDS if patience is None else patience
    ends = time.monotonic() + patience
    while not _is_open(path):
        if time.monotonic() > ends:
            raise SiteAwayError(f"no service listens at the site's socket after {patience:g} s; see its log")
        time.sleep(0.1)
    transport, timeout = httpx.HTTPTransport(uds=path), httpx.Timeout(_SILENCE_SECONDS)
    return httpx.Client(transport=transport, base_url="http://site", headers=HEADERS, timeout=timeout)


def _is_open(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def post(service: httpx.Client, path: str, token: str, **body: Any) -> httpx.Response:
    """Return the service's whole answer.

    Raises:
        SiteAwayError: it does not answer, or refuses in no words of its own.
        FedLLMError: it refuses.
    """
    request = service.build_request("POST", path, headers=_authorised(token), **body)
    response = _sent(service, request)
    try:
        response.read()
    except httpx.HTTPError as error:
        raise SiteAwayError(f"the site's service ended while it answered ({type(error).__name__})") from None
    return response


def _authorised(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def _sent(service: httpx.Client, request: httpx.Request) -> httpx.Response:
    """Return the beginning of the service's answer; raises as `post`."""
    try:
        response = service.send(request, stream=True)
    except httpx.HTTPError as error:
        raise SiteAwayError(f"the site's service does not answer ({type(error).__name__})") from None
    if response.status_code != httpx.codes.OK:
        raise _refused(response)
    return response


def _refused(response: httpx.Response) -> FedLLMError:
    try:
        response.read()
        said = response.json()
        error = FedLLMError(str(said["why"]))
        error.code = str(said["refused"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return SiteAwayError(f"the site's service answers {response.status_code}")
    return error


def _answer(service: httpx.Client, question: bytes, ticket: str) -> tuple[str, bytes]:
    """Return a code of a refusal or "", and the reply's bytes."""
    request = service.build_request("POST", "/v1/answer", headers=_authorised(ticket), content=question)
    response = _sent(service, request)
    try:
        return _read(response.iter_bytes())
    except (httpx.HTTPError, ValueError) as error:
        raise SiteAwayError(f"the site's service ended while it answered ({type(error).__name__})") from None
    finally:
        response.close()


def _read(parts: Iterator[bytes]) -> tuple[str, bytes]:
    """Read progress lines until the reply; raises ValueError where the stream ends before it does."""
    held, told = bytearray(), 0.0
    for part in parts:
        held += part
        while (end := held.find(b"\n")) >= 0:
            line = json.loads(held[:end])
            del held[: end + 1]
            if "refused" in line:
                return str(line["refused"]), b""
            if "reply" in line:
                for rest in parts:
                    held += rest
                if len(held) != line["reply"]:
                    raise ValueError("a cut reply")
                return "", bytes(held)
            if time.monotonic() > told + _PROGRESS_SECONDS:
                _logger.info("%s", " ".join(f"{key} {value}" for key, value in line.items()))
                told = time.monotonic()
    raise ValueError("no reply")
