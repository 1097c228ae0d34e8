"""Deltas of one factor, of a client's own rank, or of a whole node: what comes back, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedllm.adapters.layout import at_rank
from fedllm.adapters.parts import PARTS, part_of, part_size, whole_of
from fedllm.errors import WireError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.wire import packets, replies
from tests.builders import client_update, small_layout

LAYOUT = small_layout(rank=4)
SECRET = "xyzzy-private"
RANKS = {"a": 4, "b": 1, "c": 3}


def delta_of(rank: int, part: str, seed: int = 1) -> torch.Tensor:
    """Return a whole delta of a rank in which one part has moved."""
    layout = at_rank(LAYOUT, rank)
    moved = torch.randn(part_size(layout, part), generator=torch.Generator().manual_seed(seed))
    return whole_of(layout, moved, part)


def updates_of(part: str) -> list[ClientUpdate]:
    return [client_update(name, delta_of(rank, part), rank=rank) for name, rank in RANKS.items()]


def reply(part: str, payload: str = "fp32") -> RecordDict:
    return replies.write_updates(updates_of(part), layout=LAYOUT, part=part, payload=payload)


def read(content: RecordDict, part: str) -> list[ClientUpdate | ClientFailure]:
    return list(replies.read_updates(content, layout=LAYOUT, ranks=RANKS, part=part, round_num=4))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_clients_rank_comes_back_as_a_whole_delta(part: str) -> None:
    for got, sent in zip(read(reply(part), part), updates_of(part), strict=True):
        assert isinstance(got, ClientUpdate)
        assert got.rank == sent.rank
        assert torch.equal(got.delta, sent.delta)
        assert not got.members


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("payload", packets.PAYLOADS)
def test_only_the_part_travels(part: str, payload: str) -> None:
    for name, array in reply(part, payload)["updates"].items():
        layout = at_rank(LAYOUT, RANKS[name])
        header = len(array.data) - packets.payload_bytes(part_size(layout, part), payload)
        assert 41 < header < 200


def test_what_was_not_trained_is_not_sent_even_if_it_had_moved() -> None:
    whole = torch.ones(LAYOUT.size)
    content = replies.write_updates(
        [client_update("a", whole, rank=4)], layout=LAYOUT, part="b", payload="fp32"
    )
    (got,) = replies.read_updates(content, layout=LAYOUT, ranks={"a": 4}, part="b", round_num=4)
    assert isinstance(got, ClientUpdate)
    assert torch.equal(part_of(LAYOUT, got.delta, "a"), torch.zeros(part_size(LAYOUT, "a")))
    assert torch.equal(part_of(LAYOUT, got.delta, "b"), torch.ones(part_size(LAYOUT, "b")))


@pytest.mark.parametrize("sent", PARTS)
@pytest.mark.parametrize("asked", PARTS)
def test_another_part_than_asked_for_is_refused(sent: str, asked: str) -> None:
    answers = read(reply(sent), asked)
    if sent == asked:
        assert all(isinstance(answer, ClientUpdate) for answer in answers)
        return
    for answer in answers:
        assert isinstance(answer, ClientFailure)
        assert answer.reason == f"packet holds part '{sent}', expected part '{asked}'"


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_another_rank_than_asked_for_is_refused(rank: int) -> None:
    content = reply("b")
    layout = at_rank(LAYOUT, rank)
    content["updates"]["c"] = packets.write_vector(
        torch.zeros(part_size(layout, "b")), layout, "b", 4, "fp32"
    )
    *sound, refused = read(content, "b")
    assert all(isinstance(answer, ClientUpdate) for answer in sound)
    assert isinstance(refused, ClientFailure)
    assert "rank" in refused.reason or "bytes" in refused.reason


@pytest.mark.parametrize("name", [SECRET, "base-delta"])
def test_an_unknown_part_is_refused_without_a_word_of_the_sender(name: str) -> None:
    content = reply("b")
    vector = torch.zeros(part_size(LAYOUT, "b"))
    content["updates"]["a"] = packets.write_vector(vector, LAYOUT, name, 4, "fp32")
    refused, *_ = read(content, "b")
    assert isinstance(refused, ClientFailure)
    assert SECRET not in refused.reason
    assert "part" in refused.reason


# --- sums --------------------------------------------------------------------------------------------------

MEAN = torch.linspace(-1, 1, LAYOUT.size)


def sum_reply(part: str = "both", payload: str = "fp32") -> RecordDict:
    results: list[ClientUpdate | ClientFailure] = [
        client_update("a", MEAN, rank=4, weight=1.0),
        ClientFailure(client_id="b", code="no-data"),
        client_update("c", MEAN, rank=4, weight=3.0, train_loss=0.5),
    ]
    return replies.write_sum(results, MEAN, layout=LAYOUT, part=part, payload=payload)


def read_sum(content: RecordDict, part: str = "both") -> list[ClientUpdate | ClientFailure]:
    return replies.read_sum(content, layout=LAYOUT, part=part, round_num=4, most=3)


@pytest.mark.parametrize("part", PARTS)
def test_a_sum_comes_back_as_one_update_with_its_members(part: str) -> None:
    content = recorddict_from_proto(recorddict_to_proto(sum_reply(part)))  # as Flower carries it
    total, failure = read_sum(content, part)
    assert isinstance(total, ClientUpdate)
    reported = {"code": "no-data", "reason": "client reports no-data", "sent_nothing": True}
    assert failure == ClientFailure(client_id="b", **reported)
    assert torch.equal(part_of(LAYOUT, total.delta, part), part_of(LAYOUT, MEAN, part))
    assert (total.weight, total.num_tokens, total.rank) == (4.0, 62, 4)
    assert [(m.client_id, m.weight, m.train_loss) for m in total.members] == [
        ("a", 1.0, 0.25),
        ("c", 3.0, 0.5),
    ]
    assert [member.delta.numel() for member in total.members] == [0, 0]


def test_a_sum_is_one_packet_however_many_clients_it_is_of() -> None:
    sizes = []
    for number in (1, 2, 50):
        results = [client_update(f"c{index}", MEAN, rank=4) for index in range(number)]
        content = replies.write_sum(results, MEAN, layout=LAYOUT, part="b", payload="bf16")
        sizes.append(packets.packet_bytes(content))
    assert len(set(sizes)) == 1


def test_a_node_of_which_no_client_has_an_update_sends_no_sum() -> None:
    failure = ClientFailure(client_id="a", code="non-finite")
    content = replies.write_sum([failure], torch.zeros(0), layout=LAYOUT, part="b", payload="bf16")
    assert set(content) == {"clients"}
    (answer,) = read_sum(content, "b")
    assert isinstance(answer, ClientFailure)
    assert answer.code == "non-finite"


def _no_sum(content: RecordDict) -> None:
    del content["sum"]


def _two_sums(content: RecordDict) -> None:
    content["sum"]["more"] = content["sum"]["sum"]


def _other_name(content: RecordDict) -> None:
    content["sum"][SECRET] = content["sum"].pop("sum")


def _updates_too(content: RecordDict) -> None:
    content["updates"] = ArrayRecord({"a": content["sum"]["sum"]})


def _sum_of_nobody(content: RecordDict) -> None:
    content["clients"]["codes"] = ["failed"] * 3
    del content["metrics"]


@pytest.mark.parametrize("damage", [_no_sum, _two_sums, _other_name, _updates_too, _sum_of_nobody])
def test_a_sum_of_any_other_form_is_refused(damage: Callable[[RecordDict], None]) -> None:
    content = sum_reply()
    damage(content)
    with pytest.raises(WireError) as caught:
        read_sum(content)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"layout_digest": at_rank(LAYOUT, 3).digest},
        {"part": "b"},
        {"round_num": 3},
        {"vector": torch.zeros(LAYOUT.size - 1)},
    ],
)
def test_a_bad_packet_fails_every_client_of_a_sum(changes: dict[str, Any]) -> None:
    content = sum_reply()
    values = {"layout_digest": LAYOUT.digest, "part": "both", "round_num": 4, "payload": "fp32"}
    vector = changes.pop("vector", MEAN)
    content["sum"]["sum"] = packets.to_array(packets.encode(vector, **{**values, **changes}))
    answers = read_sum(content)
    assert [(answer.client_id, type(answer)) for answer in answers] == [
        ("a", ClientFailure),
        ("c", ClientFailure),
        ("b", ClientFailure),
    ]


def test_an_answer_in_the_other_form_is_refused() -> None:
    with pytest.raises(WireError):
        read(sum_reply(), "both")
    with pytest.raises(WireError):
        read_sum(reply("both"))
