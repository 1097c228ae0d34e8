"""Bad packets inside replies: one fails its own client alone, and only clients with an update have one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, RecordDict

from fedllm.adapters.layout import AdapterLayout
from fedllm.errors import WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.wire import packets, replies
from tests.builders import client_update, small_layout

LAYOUT, OTHER_RANK = small_layout(), small_layout(rank=1)
DELTA = torch.linspace(-1, 1, LAYOUT.size)
SECRET = "xyzzy-private"


def reply() -> RecordDict:
    updates = [client_update(name, DELTA) for name in ("a", "b")]
    return replies.write_updates(updates, layout=LAYOUT, part="both", payload="fp32")


def read(content: RecordDict) -> list[ClientUpdate | ClientFailure]:
    return list(
        replies.read_updates(content, layout=LAYOUT, ranks={"a": 2, "b": 2}, part="both", round_num=4)
    )


def packet(layout: AdapterLayout = LAYOUT, size: int | None = None, round_num: int = 4) -> bytes:
    vector = torch.zeros(size or layout.size)
    return packets.encode(vector, layout_digest=layout.digest, round_num=round_num, payload="fp32")


def as_array(data: bytes, **changes: Any) -> Array:
    values = {"dtype": "uint8", "shape": (len(data),), "stype": packets.PACKET_TYPE, "data": data}
    return Array(**{**values, **changes})


BAD_PACKETS = {
    "cut": as_array(packet()[:-1]),
    "empty": as_array(b""),
    "not a packet": as_array(SECRET.encode()),
    "earlier round": as_array(packet(round_num=3)),
    "other rank": as_array(packet(OTHER_RANK)),
    "other size": as_array(packet(size=LAYOUT.size + 1)),
    "oversized": as_array(packet(size=LAYOUT.size * 4)),
    "numpy array": Array(np.zeros(LAYOUT.size, "float32")),
    "other stype": as_array(packet(), stype=SECRET),
    "other dtype": as_array(packet(), dtype=SECRET),
}


@pytest.mark.parametrize("kind", BAD_PACKETS)
def test_a_bad_packet_fails_its_own_client_alone(kind: str) -> None:
    content = reply()
    content["updates"]["a"] = BAD_PACKETS[kind]
    bad, good = read(content)
    assert isinstance(bad, ClientFailure)
    assert (bad.client_id, bad.code) == ("a", "bad-packet")
    assert SECRET not in bad.reason
    assert "\n" not in bad.reason
    assert isinstance(good, ClientUpdate)
    assert torch.equal(good.delta, DELTA)


def _rename(content: RecordDict) -> None:
    content["updates"][SECRET] = content["updates"].pop("a")


def _drop(content: RecordDict) -> None:
    content["updates"].pop("a")


def _add(content: RecordDict) -> None:
    content["updates"][SECRET] = content["updates"]["a"]


def _drop_all(content: RecordDict) -> None:
    del content["updates"]


def _report_failure_with_a_packet(content: RecordDict) -> None:
    content["clients"]["codes"] = ["ok", "failed"]
    for column in content["metrics"].values():
        column.pop()


@pytest.mark.parametrize("damage", [_rename, _drop, _add, _drop_all, _report_failure_with_a_packet])
def test_packets_of_clients_without_an_update_are_refused(
    damage: Callable[[RecordDict], None],
) -> None:
    content = reply()
    damage(content)
    with pytest.raises(WireError) as caught:
        read(content)
    assert SECRET not in str(caught.value)
