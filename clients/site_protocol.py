"""How a messenger and a site's service talk: HTTP over a Unix socket, and Flower's own protobuf.

    POST /v1/ticket   the launch key of a node, and the bundle that came   -> a ticket for one answer
    POST /v1/answer   a ticket, and the question                          -> progress, then the reply
    GET  /v1/health                                                       -> what the service is doing

A question is a length of 4 bytes, a JSON object of that length, and the message. An answer is JSON lines:
`{"waiting": 1}` and `{"step": 3, "of": 40}` while it is worked at, at last `{"refused": CODE}`, or `{"reply":
5120}` before so many bytes of protobuf.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

import fedllm
from clients.kinds import KINDS, kind_of
from fedllm.config.key import Scalar
from fedllm.errors import OtherVersionError, WireError

# Names in the environment of a site's processes, each of which knows no other's.
KEYS = "FEDLLM_SITE_KEYS"  # the service: SHA-256 of a launch key -> node, as JSON
LAUNCH_KEY = "FEDLLM_LAUNCH_KEY"  # a node's SuperExec: what it is told by
SOCKET, TICKET = "FEDLLM_SITE_SOCKET", "FEDLLM_SITE_TICKET"  # a messenger

PROTOCOL = "1"
HEADERS = {"fedllm-protocol": PROTOCOL, "fedllm-version": fedllm.__version__}
_LENGTH_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A question that a messenger carries: the server's message, and what Flower says of its run."""

    message: Message
    run_id: int
    node_id: int
    run_config: Mapping[str, Scalar]


def write_question(asked: Carried) -> bytes:
    """Return a question as bytes."""
    head = json.dumps(
        {"run-id": asked.run_id, "node-id": asked.node_id, "run-config": dict(asked.run_config)}
    ).encode()
    message: bytes = message_to_proto(asked.message).SerializeToString()
    return len(head).to_bytes(_LENGTH_BYTES) + head + message


def read_question(data: bytes) -> Carried:
    """Return the question that bytes hold.

    Raises:
        WireError: they hold none.
    """
    begin = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES])
    try:
        head: dict[str, Any] = json.loads(data[_LENGTH_BYTES:begin])
        numbers = {"run_id": head["run-id"], "node_id": head["node-id"]}
        config = head["run-config"]
        message = message_from_proto(ProtoMessage.FromString(data[begin:]))
    except (ValueError, KeyError, TypeError) as error:
        raise WireError(f"no question of a messenger ({type(error).__name__})") from None
    is_flat = isinstance(config, dict) and all(
        isinstance(one, bool | int | float | str) for one in config.values()
    )
    if (
        not is_flat
        or not all(type(number) is int for number in numbers.values())
        or not message.has_content()
        or kind_of(message) not in KINDS
    ):
        raise WireError("no question of a messenger (wrong types)")
    return Carried(message=message, run_config=config, **numbers)


def write_reply(content: RecordDict) -> bytes:
    """Return a reply's content as bytes."""
    data: bytes = recorddict_to_proto(content).SerializeToString()
    return data


def read_reply(data: bytes) -> RecordDict:
    """Return the content of a reply."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def check_version(theirs: Mapping[str, str]) -> None:
    """Compare the headers of another process of this site with this one's own.

    Raises:
        OtherVersionError: it speaks another protocol, or runs another version of fedllm.
    """
    for name, ours in HEADERS.items():
        if (found := theirs.get(name, "none")[:32]) != ours:
            raise OtherVersionError(
                f"{name} is {found!r} there and {ours!r} here; restart the site after an installation"
            )


def digest_of(secret: str) -> str:
    """Return the SHA-256 (hex) of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()
