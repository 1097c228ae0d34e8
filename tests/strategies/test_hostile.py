"""One of four data holders answers with anything but an honest update; the round goes on without it."""

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from clients import jobs
from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.parts import part_size
from fedllm.runs.records import record_to_line
from fedllm.wire import packets
from strategies.exchange.evaluation import evaluate
from strategies.rounds import next_round

OFFENDER, NODE = "ben", 3
SECRET = "xyzzy-private row of text"
Tampering = Callable[[RecordDict, AdapterLayout], Any]


def as_packet(data: bytes, **changes: Any) -> Array:
    values = {"dtype": "uint8", "shape": (len(data),), "stype": packets.PACKET_TYPE, "data": data}
    return Array(**{**values, **changes})


def delta_of(content: RecordDict, layout: AdapterLayout) -> torch.Tensor:
    data = content["updates"][OFFENDER].data
    return packets.decode(data, layout_digest=layout.digest, size=layout.size).clone()


def sends(content: RecordDict, data: bytes, **changes: Any) -> None:
    content["updates"][OFFENDER] = as_packet(data, **changes)


def encoded(vector: torch.Tensor, layout: AdapterLayout, round_num: int = 1) -> bytes:
    return packets.encode(vector, layout_digest=layout.digest, round_num=round_num, payload="fp32")


def one_value(value: float) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        delta = delta_of(content, layout)
        delta[len(delta) // 2] = value
        sends(content, encoded(delta, layout))

    return tamper


def other_layout(**changes: Any) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        other = replace(layout, **changes)
        sends(content, encoded(torch.zeros(other.size), other))

    return tamper


def other_part(part: str) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        vector = torch.zeros(part_size(layout, part))
        data = packets.encode(vector, layout_digest=layout.digest, round_num=1, payload="fp32", part=part)
        sends(content, data)

    return tamper


def sum_instead(content: RecordDict, layout: AdapterLayout) -> None:
    content["sum"] = ArrayRecord({"sum": content["updates"][OFFENDER]})
    del content["updates"]


def other_size(extra: int) -> Tampering:
    return lambda content, layout: sends(content, encoded(torch.zeros(layout.size + extra), layout))


def earlier_round(content: RecordDict, layout: AdapterLayout) -> None:
    sends(content, encoded(delta_of(content, layout), layout, round_num=0))


def header_numbers(digits: int) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        header = {"layout": layout.digest, "part": "both", "payload": "fp32", "round": 1, "size": 1}
        text = json.dumps(header).replace(": 1", ": 1" + digits * "0").encode()
        body = b"FLLM\x02" + struct.pack("<I", len(text)) + text
        sends(content, body + hashlib.sha256(body).digest())

    return tamper


def other_payload_bytes(content: RecordDict, layout: AdapterLayout) -> None:
    header = {"layout": layout.digest, "part": "both", "payload": "fp32", "round": 1, "size": layout.size}
    text = json.dumps(header).encode()
    body = b"FLLM\x02" + struct.pack("<I", len(text)) + text + bytes(2 * layout.size)
    sends(content, body + hashlib.sha256(body).digest())


def flipped_byte(where: int) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        data = bytearray(content["updates"][OFFENDER].data)
        data[where] ^= 1
        sends(content, bytes(data))

    return tamper


def packet(data: bytes, **changes: Any) -> Tampering:
    return lambda content, layout: sends(content, data, **changes)


def numpy_array(content: RecordDict, layout: AdapterLayout) -> None:
    content["updates"][OFFENDER] = Array(np.zeros(layout.size))


def other_array_type(content: RecordDict, layout: AdapterLayout) -> None:
    sends(content, content["updates"][OFFENDER].data, stype=SECRET)


def renamed_entry(content: RecordDict, layout: AdapterLayout) -> None:
    content["updates"][SECRET] = content["updates"].pop(OFFENDER)


def missing_entry(content: RecordDict, layout: AdapterLayout) -> None:
    del content["updates"]


def extra_entry(content: RecordDict, layout: AdapterLayout) -> None:
    content["updates"][SECRET] = content["updates"][OFFENDER]


def answers_as(*names: str) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> RecordDict:
        column = {name: values * len(names) for name, values in content["metrics"].items()}
        return RecordDict(
            {
                "clients": ConfigRecord({"ids": list(names), "codes": ["ok"] * len(names)}),
                "metrics": MetricRecord(column),
                "updates": ArrayRecord(dict.fromkeys(names, content["updates"][OFFENDER])),
            }
        )

    return tamper


def metric(name: str, value: Any) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        content["metrics"][name] = value

    return tamper


def above_what_it_declared(content: RecordDict, layout: AdapterLayout) -> None:
    content["metrics"]["weight"] = [content["metrics"]["weight"][0] + 1]


def codes(*values: str) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        content["clients"]["codes"] = list(values)

    return tamper


def extra_record(record: Any) -> Tampering:
    def tamper(content: RecordDict, layout: AdapterLayout) -> None:
        content["note"] = record

    return tamper


def error_code(code: str) -> Tampering:
    return lambda content, layout: RecordDict({"error": ConfigRecord({"code": code})})


def flower_error(code: int) -> Tampering:
    return lambda content, layout: Error(code, f"Traceback ... ValueError: {SECRET}")


KINDS: dict[str, Tampering] = {
    "NaN": one_value(math.nan),
    "largest float": one_value(3e38),
    "a step too far": one_value(1.0),
    "infinity": one_value(-math.inf),
    "one value too many": other_size(1),
    "one value too few": other_size(-1),
    "other rank": other_layout(rank=3),
    "other rank of the same scale": lambda content, layout: other_layout(rank=1, alpha=layout.scale)(
        content, layout
    ),
    "A alone": other_part("a"),
    "B alone": other_part("b"),
    "a sum that was not asked for": sum_instead,
    "other alpha": other_layout(alpha=64.0),
    "other base model": other_layout(fingerprint="0" * 64),
    "packet of an earlier round": earlier_round,
    "bytes of another payload": other_payload_bytes,
    "wrong checksum": flipped_byte(-1),
    "flipped bit": flipped_byte(300),
    "undecodable bytes": packet(SECRET.encode()),
    "no bytes": packet(b""),
    "oversized packet": packet(bytes(10_000_000)),
    "deep header": packet(b"FLLM\x02" + struct.pack("<I", 4000) + b"[" * 4000 + bytes(40)),
    "numpy array": numpy_array,
    "other array type": other_array_type,
    "numbers of 1,800 digits": header_numbers(1_800),
    "answers for 20,000 strangers": lambda content, layout: answers_as(*map(str, range(20_000)))(
        content, layout
    ),
    "answers for a few strangers": answers_as("\x1b[2J", "\u202eevil", "e" * 100_000),
    "renamed entry": renamed_entry,
    "missing entry": missing_entry,
    "extra entry": extra_entry,
    "names itself twice": answers_as(OFFENDER, OFFENDER),
    "answers for another client": answers_as("anna"),
    "answers for a stranger": answers_as(SECRET),
    **{f"weight {value}": metric("weight", [value]) for value in (-4.0, 0.0, math.nan, math.inf, 1e12)},
    "weight above what it declared": above_what_it_declared,
    "weight as whole number": metric("weight", [4]),
    "two weights": metric("weight", [1.0, 1.0]),
    "loss NaN": metric("train_loss", [math.nan]),
    **{f"loss {value}": metric("train_loss", [value]) for value in (-1.0, math.inf, 1e200)},
    **{f"seconds {value}": metric("seconds", [value]) for value in (-1.0, math.nan, math.inf, 1e200)},
    "extra metric": metric(SECRET, [1.0]),
    "text as code": codes(SECRET),
    "two codes": codes("ok", "ok"),
    "failure with a packet": codes("failed"),
    "extra record of text": extra_record(ConfigRecord({"text": SECRET})),
    "extra record of numbers": extra_record(MetricRecord({"tokens": [1, 2, 3]})),
    "error code": error_code("out-of-memory"),
    "error text": error_code(SECRET),
    **{f"Flower error {code}": flower_error(code) for code in (0, 2, 5, 8, 99)},
    "no content": lambda content, layout: RecordDict(),
    "other content": lambda content, layout: RecordDict({"arrays": ArrayRecord(), SECRET: ConfigRecord()}),
}


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """Keep the adapter of the round that the offender does not take part in."""
    return {}


@pytest.fixture
def expected_digest(make_config: Callable, open_run: Callable, digests: dict[str, str]) -> str:
    """Return the digest of the adapter that three clients give when the fourth is simply absent."""
    if not digests:
        run = open_run(make_config(), absent=[NODE])
        digests["absent"] = next_round(run.session, run.state)[0].adapter.digest
    return digests["absent"]


def tampering(tamper: Tampering, layout_of_run: list[AdapterLayout]) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id != NODE or reply.metadata.message_type != "train":
            return [reply]
        changed = tamper(reply.content, layout_of_run[0])
        if isinstance(changed, Error):
            reply.__dict__["_content"], reply.__dict__["_error"] = None, changed
        elif changed is not None:
            reply.content = changed
        return [reply]

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_reply_costs_its_sender_the_round_and_nobody_else(
    kind: str, make_config: Callable, open_run: Callable, expected_digest: str
) -> None:
    layouts: list[AdapterLayout] = []
    run = open_run(make_config(), (), tampering(KINDS[kind], layouts))
    layouts.append(run.session.layout)
    state, record = next_round(run.session, run.state)
    assert record.applied
    assert record.accepted == ("anna", "cleo", "dora")
    assert list(record.lost) == [OFFENDER]
    assert state.adapter.checked_finite().digest == expected_digest
    reason = record.lost[OFFENDER]
    assert reason
    assert "\n" not in reason
    for told in (reason, record_to_line(record), *run.notices):
        assert "xyzzy" not in told
        assert told.isprintable()
    assert len(reason) < 200
    assert sum(map(len, (record_to_line(record), *run.notices))) < 4_000


@pytest.mark.parametrize("number", [3, 20_000])
def test_an_evaluation_of_strangers_says_one_line(
    number: int, make_config: Callable, open_run: Callable
) -> None:
    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == NODE and reply.metadata.message_type == "evaluate":
            names = [f"\x1b[2J{SECRET}{place}" for place in range(number)]
            reply.content["clients"] = ConfigRecord({"ids": names, "codes": ["ok"] * number})
            metrics = reply.content["metrics"]
            reply.content["metrics"] = MetricRecord({key: metrics[key] * number for key in metrics})
        return [reply]

    run = open_run(make_config(), tamper=tamper)
    held_out = evaluate(run.session, run.state)
    assert set(held_out.shared) == {"anna", "cleo", "dora"}
    (notice,) = run.notices
    assert notice.isprintable()
    assert len(notice) < 200
    assert "xyzzy" not in notice


def test_an_exception_at_a_client_sends_none_of_its_words(
    make_config: Callable, open_run: Callable, expected_digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = jobs.make_job

    def crash(this_round: Any, client: Any, *rest: Any, **options: Any) -> Any:
        if client.client_id == OFFENDER:
            raise RuntimeError(f"cannot train on {SECRET}")
        return honest(this_round, client, *rest, **options)

    monkeypatch.setattr(jobs, "make_job", crash)
    run = open_run(make_config())
    state, record = next_round(run.session, run.state)
    assert state.adapter.digest == expected_digest
    assert record.lost == {OFFENDER: "client reports internal"}


def test_a_reply_that_comes_twice_counts_once(make_config: Callable, open_run: Callable) -> None:
    once, twice = open_run(make_config()), open_run(make_config(), tamper=lambda reply: [reply, reply])
    expected, _ = next_round(once.session, once.state)
    state, record = next_round(twice.session, twice.state)
    assert record.accepted == ("anna", "ben", "cleo", "dora")
    assert state.adapter.digest == expected.adapter.digest


def test_a_reply_replayed_in_the_next_round_is_refused(make_config: Callable, open_run: Callable) -> None:
    kept: list[RecordDict] = []

    def replay(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == NODE and reply.metadata.message_type == "train":
            kept.append(reply.content)
            reply.content = kept[0]
        return [reply]

    def silence(reply: Message) -> list[Message]:
        if reply.metadata.src_node_id == NODE and reply.metadata.message_type == "train":
            kept.append(reply.content)
            reply.content = kept[0] if len(kept) == 1 else RecordDict()
        return [reply]

    digests = []
    for tamper in (replay, silence):
        kept.clear()
        run = open_run(make_config(), tamper=tamper)
        state, record = next_round(run.session, run.state)
        assert record.accepted == ("anna", "ben", "cleo", "dora")
        state, record = next_round(run.session, state)
        assert list(record.lost) == [OFFENDER]
        digests.append(state.adapter.digest)
    assert digests[0] == digests[1]
