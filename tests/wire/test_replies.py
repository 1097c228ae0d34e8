from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedllm.errors import CLIENT_ERROR_CODES, WireError
from fedllm.messages import ClientEvaluation, ClientFailure, ClientUpdate, JoinedClient
from fedllm.wire import joining, packets, refusals, replies
from tests.builders import client_update, small_layout

LAYOUT = small_layout()
DELTA = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(1))
SECRET = "xyzzy-private"


def evaluation(client_id: str) -> ClientEvaluation:
    return ClientEvaluation(client_id=client_id, loss=0.75, personal_loss=0.5, num_tokens=11, num_rows=2)


def joined(client_id: str) -> JoinedClient:
    return JoinedClient(
        client_id=client_id, node_id=9, num_train=3, num_held_out=0, fingerprint="f" * 64, max_rank=2
    )


def updates_reply() -> RecordDict:
    failure = ClientFailure(client_id="c", code="no-data")
    return replies.write_updates(
        [client_update("a", DELTA), failure, client_update("b", DELTA)],
        layout=LAYOUT,
        part="both",
        payload="fp32",
    )


def evaluations_reply() -> RecordDict:
    failure = ClientFailure(client_id="c", code="non-finite")
    return replies.write_evaluations([evaluation("a"), evaluation("b"), failure])


def joined_reply() -> RecordDict:
    return joining.write_joined([joined("a"), joined("b"), joined("c")])


def read_evaluations(content: RecordDict) -> list[ClientEvaluation | ClientFailure]:
    return replies.read_evaluations(content, most=3)


def read_updates(content: RecordDict, with_controls: bool = False) -> list[ClientUpdate | ClientFailure]:
    return list(
        replies.read_updates(
            content,
            layout=LAYOUT,
            ranks=dict.fromkeys("abc", 2),
            part="both",
            round_num=4,
            with_controls=with_controls,
        )
    )


READERS: dict[str, tuple[Callable[[], RecordDict], Callable[[RecordDict], Any]]] = {
    "updates": (updates_reply, read_updates),
    "evaluations": (evaluations_reply, read_evaluations),
    "joined": (joined_reply, lambda content: joining.read_joined(content, 9, most=3)),
}


def test_an_updates_reply_comes_back_as_it_was() -> None:
    a, c, b = read_updates(updates_reply())
    assert isinstance(a, ClientUpdate)
    assert isinstance(b, ClientUpdate)
    sent = client_update("a", DELTA)
    assert torch.equal(a.delta, DELTA)
    for name in ("round_num", "weight", "num_tokens", "train_loss", "num_truncated", "seconds"):
        assert getattr(a, name) == getattr(sent, name)
    assert (b.client_id, c) == (
        "b",
        ClientFailure(client_id="c", code="no-data", reason=c.reason, sent_nothing=True),
    )


def controls_reply() -> RecordDict:
    changes = {name: torch.full((LAYOUT.size,), float(number)) for number, name in enumerate("ab")}
    sent = [client_update(name, DELTA, control_delta=change) for name, change in changes.items()]
    return replies.write_updates(sent, layout=LAYOUT, part="both", payload="fp32")


def test_control_variates_come_back_where_they_are_wanted() -> None:
    answers = read_updates(controls_reply(), with_controls=True)
    for number, answer in enumerate(answers):
        assert isinstance(answer, ClientUpdate)
        assert answer.control_delta is not None
        assert answer.control_delta.tolist() == [number] * LAYOUT.size
        assert torch.equal(answer.delta, DELTA)


def test_control_variates_come_exactly_where_they_are_wanted() -> None:
    with pytest.raises(WireError, match="not on the list"):
        read_updates(controls_reply())
    with pytest.raises(WireError, match="do not match the clients"):
        read_updates(updates_reply(), with_controls=True)
    content = controls_reply()
    del content["controls"]["b"]
    with pytest.raises(WireError, match="do not match the clients"):
        read_updates(content, with_controls=True)


def test_an_evaluations_reply_comes_back_as_it_was() -> None:
    a, b, c = read_evaluations(evaluations_reply())
    assert (a, b) == (evaluation("a"), evaluation("b"))
    assert isinstance(c, ClientFailure)
    assert c.code == "non-finite"


def test_without_a_personal_adapter_both_losses_are_the_same() -> None:
    sent = ClientEvaluation(client_id="a", loss=0.75, num_tokens=11, num_rows=2)
    (got,) = read_evaluations(replies.write_evaluations([sent]))
    assert isinstance(got, ClientEvaluation)
    assert got.personal_loss == got.loss == 0.75


def test_a_join_reply_comes_back_as_it_was() -> None:
    assert joining.read_joined(joined_reply(), 9, most=3) == [joined("a"), joined("b"), joined("c")]


def test_a_node_without_clients_declares_none() -> None:
    assert joining.read_joined(joining.write_joined([]), 9, most=3) == []


def test_replies_with_nothing_done_can_be_written_and_read() -> None:
    failures = [ClientFailure(client_id="a", code="no-data")]
    content = replies.write_updates(failures, layout=LAYOUT, part="both", payload="bf16")
    assert set(content) == {"clients"}
    assert [answer.code for answer in read_updates(content)] == ["no-data"]
    assert [answer.code for answer in read_evaluations(content)] == ["no-data"]
    for empty in (
        replies.write_updates([], layout=LAYOUT, part="both", payload="bf16"),
        replies.write_evaluations([]),
    ):
        with pytest.raises(WireError):
            read_updates(empty)


@pytest.mark.parametrize("name", ["metrics", "updates"])
def test_no_text_hides_under_a_known_name(name: str) -> None:
    failures = [ClientFailure(client_id="a", code="no-data")]
    content = replies.write_updates(failures, layout=LAYOUT, part="both", payload="bf16")
    content[name] = ConfigRecord({"text": SECRET})
    with pytest.raises(WireError, match="not on the list"):
        read_updates(content)


def test_packet_bytes_are_those_of_the_packets() -> None:
    length = len(packets.encode(DELTA, layout_digest=LAYOUT.digest, round_num=4, payload="fp32"))
    assert packets.packet_bytes(updates_reply()) == 2 * length
    assert packets.packet_bytes(evaluations_reply()) == 0


def _extra_config(content: RecordDict) -> None:
    content["note"] = ConfigRecord({"text": SECRET})


def _extra_metrics(content: RecordDict) -> None:
    content["more"] = MetricRecord({"x": 1.0})


def _extra_arrays(content: RecordDict) -> None:
    content["more"] = ArrayRecord({SECRET: Array(np.zeros(1, "float32"))})


def _extra_metric(content: RecordDict) -> None:
    content["metrics"][SECRET] = list(next(iter(content["metrics"].values())))


def _missing_metric(content: RecordDict) -> None:
    content["metrics"].pop(next(iter(content["metrics"])))


def _longer_metric(content: RecordDict) -> None:
    values = next(iter(content["metrics"].values()))
    values.append(values[0])


def _shorter_metric(content: RecordDict) -> None:
    next(iter(content["metrics"].values())).pop()


def _empty_metric(content: RecordDict) -> None:
    content["metrics"][next(iter(content["metrics"]))] = []


def _scalar_metric(content: RecordDict) -> None:
    name, values = next(iter(content["metrics"].items()))
    content["metrics"][name] = values[0]


def _other_numbers(content: RecordDict) -> None:
    name, values = next(iter(content["metrics"].items()))
    other = int if isinstance(values[0], float) else float
    content["metrics"][name] = [other(value) for value in values]


def _no_metrics(content: RecordDict) -> None:
    del content["metrics"]


def _metrics_as_text(content: RecordDict) -> None:
    content["metrics"] = ConfigRecord({"text": SECRET})


def _no_clients(content: RecordDict) -> None:
    del content["clients"]


def _clients_as_metrics(content: RecordDict) -> None:
    content["clients"] = MetricRecord({"ids": [1, 2, 3]})


def _extra_list(content: RecordDict) -> None:
    content["clients"]["note"] = [SECRET] * 3


def _duplicate_id(content: RecordDict) -> None:
    content["clients"]["ids"] = ["a", "a", "c"]


def _fewer_ids(content: RecordDict) -> None:
    content["clients"]["ids"] = ["a", "b"]


def _empty_ids(content: RecordDict) -> None:
    content["clients"]["ids"] = []


def _numbered_ids(content: RecordDict) -> None:
    content["clients"]["ids"] = [1, 2, 3]


def _one_id(content: RecordDict) -> None:
    content["clients"]["ids"] = "a"


COMMON = [
    _extra_config, _extra_metrics, _extra_arrays, _extra_metric, _missing_metric, _longer_metric,
    _shorter_metric, _empty_metric, _scalar_metric, _other_numbers, _no_metrics, _metrics_as_text,
    _no_clients, _clients_as_metrics, _extra_list, _duplicate_id, _fewer_ids, _empty_ids, _numbered_ids,
    _one_id, RecordDict.clear,
]  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("damage", COMMON, ids=lambda damage: damage.__name__.strip("_"))
def test_a_reply_of_any_other_form_is_refused(kind: str, damage: Callable[[RecordDict], None]) -> None:
    make, read = READERS[kind]
    content = make()
    assert len(read(content)) == 3
    damage(content)
    with pytest.raises(WireError) as caught:
        read(content)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["updates", "evaluations"])
@pytest.mark.parametrize("code", ["unknown", SECRET, "OK", ""])
def test_a_code_outside_the_list_is_refused(kind: str, code: str) -> None:
    make, read = READERS[kind]
    content = make()
    content["clients"]["codes"][2] = code
    with pytest.raises(WireError) as caught:
        read(content)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("code", [SECRET, 7, ["failed"], "out-of-memory"])
def test_an_error_reply_is_refused_with_a_known_code_alone(kind: str, code: Any) -> None:
    content = RecordDict({"error": ConfigRecord({"code": code, "note": SECRET})})
    with pytest.raises(WireError) as caught:
        READERS[kind][1](content)
    expected = "out-of-memory" if code == "out-of-memory" else "internal"
    assert str(caught.value) == f"client reports {expected}"


@pytest.mark.parametrize("code", [*sorted(CLIENT_ERROR_CODES), SECRET])
def test_an_error_reply_holds_a_code_of_the_list_only(code: str) -> None:
    written = refusals.read_error(refusals.write_error(code))
    assert written == (code if code in CLIENT_ERROR_CODES else "internal")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ids", "x\n2026-01-01 ERROR run failed"),
        ("ids", "\x1b[2J"),
        ("ids", "a" * 65),
        ("ids", ""),
        ("fingerprints", "f" * 63),
        ("fingerprints", "\x1b[2J".ljust(64, "f")),
        ("causes", "\x1b[2J"),
        ("causes", SECRET),
    ],
)
def test_what_a_join_reply_names_can_be_printed(name: str, value: str) -> None:
    content = joined_reply()
    content["clients"][name][1] = value
    with pytest.raises(WireError) as caught:
        joining.read_joined(content, 9, most=3)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("num_train", -1), ("num_held_out", -5), ("max_rank", -1)])
def test_a_join_reply_declares_no_negative_size(name: str, value: int) -> None:
    content = joined_reply()
    content["metrics"][name][1] = value
    with pytest.raises(WireError):
        joining.read_joined(content, 9, most=3)
