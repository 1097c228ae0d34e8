"""What leaves a data holder, byte for byte: no text, no token sequence, no path, no word of an exception."""

import base64
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from transformers import PreTrainedTokenizerFast

from clients import answering, data_holder, handlers, jobs, join, protect, tokens
from clients.process import Process
from fedllm.errors import NoDataError
from fedllm.messages import EVALUATION_METRICS, HOME_METRICS, UPDATE_METRICS
from fedllm.models.base import load_tokenizer
from fedllm.models.files import resolve_model
from fedllm.originality.overlap import OverlapRequest, probe
from fedllm.wire import overlaps, packets, refusals, requests
from fedllm.wire.stock import write_plain
from scripts.runtimes.local import local_grid
from tests.builders import evaluate_request, train_request

CANARY = "kq7Zr0vXw3-ünïcode"


@pytest.fixture
def ask(write_rows: Callable, make_config: Callable) -> Callable[..., Message]:
    """Return a function (kind, stock) -> the ClientApp's reply to a request for two clients of canaries."""
    file = write_rows(f"{CANARY[:11]}.jsonl", {"anna": 6, "ben": 5}, secret=CANARY)
    at_home = {"personal.mode": "finetune", "personal.steps": 2, "data.held-out-fraction": 0.4}
    config = make_config(file, **at_home)
    holder = Process().open(config.to_flat(), {"server-paths": True})
    adapter = train_request(holder, "anna").adapter
    ours = {
        "query.join": RecordDict(),
        "train": requests.write_train_request(train_request(holder, "anna", "ben"), requests.Sending()),
        "evaluate": requests.write_evaluate_request(
            evaluate_request(holder, "anna", "ben"), requests.Sending()
        ),
        "query.adapt": requests.write_evaluate_request(
            evaluate_request(holder, "anna", "ben"), requests.Sending()
        ),
        "query.overlap": overlaps.write_overlap_request(
            OverlapRequest(1, bytes(16), (probe(range(40), bytes(16)), probe(range(9), bytes(16))))
        ),
    }

    grid = local_grid(config, answering.make_client_app(Process()))  # which opens its data holder itself

    def send(kind: str, stock: bool = False) -> Message:
        content = RecordDict({"arrays": write_plain(adapter)}) if stock else ours[kind]
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, 2, group_id="1")])
        return reply

    return send


@pytest.fixture
def leaks(make_model_folder: Callable, tmp_path: Path) -> Callable[[bytes], list[bytes]]:
    """Return a function that finds private text in bytes, in any form it could hide in."""
    tokenizer = load_tokenizer(resolve_model(str(make_model_folder())))
    tokens = tokenizer(CANARY, add_special_tokens=False)["input_ids"][1:-1]
    private = [CANARY.encode(), CANARY.encode("utf-16-le"), json.dumps(CANARY).encode()[1:-1]]
    private += [CANARY[:11].encode(), str(tmp_path).encode(), b"Return "]  # file name, path, other text
    for shift in range(3):  # base64 depends on where the text begins
        private.append(base64.b64encode(b"x" * shift + CANARY[:11].encode())[4:-4])
    private += [np.array(tokens, dtype).tobytes() for dtype in ("<i4", "<i8", "<u2", "<f4")]
    return lambda data: [form for form in private if form in data]


def bytes_of(message: Message) -> bytes:
    return message_to_proto(message).SerializeToString()


def test_the_search_finds_what_it_is_meant_to_find(
    ask: Callable, leaks: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[data_holder.DataHolder] = []
    declare = join.declare_clients
    monkeypatch.setattr(
        join, "declare_clients", lambda found, node: opened.append(found) or declare(found, node)
    )
    ask("query.join")
    row = opened[0].clients["anna"].train[0].tokens
    for dtype in ("<i4", "<i8", "<u2", "<f4"):
        assert leaks(np.array(row, dtype).tobytes())
    for text in (CANARY, f"prefix {CANARY}", json.dumps({"x": CANARY})):
        assert leaks(text.encode())
        assert leaks(base64.b64encode(text.encode()))
    assert not leaks(b"kq7Zr0v, anna, ben, 0.25")


ASKED = [
    ("query.join", False),
    ("query.overlap", False),
    ("query.adapt", False),
    ("train", False),
    ("evaluate", False),
    ("train", True),
    ("evaluate", True),
]


@pytest.mark.parametrize(("kind", "stock"), ASKED)
def test_an_honest_reply_holds_no_text_of_a_row(
    kind: str, stock: bool, ask: Callable, leaks: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    reply = ask(kind, stock)
    assert reply.has_content()
    assert leaks(bytes_of(reply)) == []
    assert leaks(caplog.text.encode()) == []


def fields_of(content: RecordDict) -> dict[str, tuple[type, set[str]]]:
    return {name: (type(record), set(record)) for name, record in content.items()}


def test_replies_hold_exactly_the_records_and_fields_on_the_list(ask: Callable) -> None:
    assert fields_of(ask("train").content) == {
        "clients": (ConfigRecord, {"ids", "codes"}),
        "metrics": (MetricRecord, set(UPDATE_METRICS)),
        "updates": (ArrayRecord, {"anna", "ben"}),
    }
    assert fields_of(ask("evaluate").content) == {
        "clients": (ConfigRecord, {"ids", "codes"}),
        "metrics": (MetricRecord, set(EVALUATION_METRICS)),
    }
    assert fields_of(ask("query.adapt").content) == {
        "clients": (ConfigRecord, {"ids", "codes"}),
        "metrics": (MetricRecord, set(HOME_METRICS)),
    }
    assert fields_of(ask("query.join").content) == {
        "clients": (ConfigRecord, {"ids", "fingerprints", "causes"}),
        "metrics": (MetricRecord, {"num_train", "num_held_out", "max_rank"}),
    }
    assert fields_of(ask("query.overlap").content) == {"metrics": (MetricRecord, {"matched", "verbatim"})}


def test_train_reply_is_packets_and_a_few_numbers(ask: Callable) -> None:
    reply = ask("train")
    sent = list(reply.content["updates"].values())
    largest = packets.max_packet_bytes(2 * 2 * (32 + 32))  # two layers, rank 2, 32 features in and out
    assert all(len(packet.data) < largest for packet in sent)
    assert len(bytes_of(reply)) - sum(len(packet.data) for packet in sent) < 1500


TEXT = f"cannot handle {CANARY}: Return 3."


class Panic(BaseException):
    """What Rust code that panics raises: no `Exception`."""


def crash(error: BaseException) -> Callable[..., Any]:
    """Return a function that fails as native code does: it prints its message by itself, and raises it."""

    def fail(*arguments: Any, **options: Any) -> Any:
        os.write(2, f"thread panicked: {error}\n".encode())
        raise error from ValueError(TEXT)

    return fail


PLACES = [
    (tokens, "encode_or_cause"),
    (jobs, "draw_rows"),
    (protect, "protect"),
    (handlers.replies, "write_updates"),
]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(TEXT), "internal"),
        (KeyError(TEXT), "internal"),
        (UnicodeDecodeError("utf-8", TEXT.encode(), 0, 1, TEXT), "internal"),
        (MemoryError(TEXT), "out-of-memory"),
        (torch.OutOfMemoryError(TEXT), "out-of-memory"),
    ],
)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_exception_that_quotes_a_row_leaves_as_a_code_alone(
    place: tuple[Any, str],
    error: Exception,
    code: str,
    ask: Callable,
    leaks: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(*place, crash(error))
    reply = ask("train")
    assert refusals.read_error(reply.content) == code
    assert set(reply.content) == {"error"}
    assert leaks(bytes_of(reply)) == []
    assert leaks(caplog.text.encode()) == []
    assert caplog.text


@pytest.mark.parametrize(("kind", "stock"), ASKED)
def test_every_kind_of_request_fails_without_a_word(
    kind: str, stock: bool, ask: Callable, leaks: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "encode_or_cause", crash(RuntimeError(TEXT)))
    reply = ask(kind, stock)
    assert leaks(bytes_of(reply)) == []
    if stock:
        assert reply.error.reason == "internal"
    else:
        assert refusals.read_error(reply.content) == "internal"


@pytest.mark.parametrize("kind", ["query.join", "train", "evaluate"])
def test_a_tokenizer_that_panics_says_nothing_anywhere(
    kind: str,
    ask: Callable,
    leaks: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of a row nothing is in the reply, in the log, or in what native code prints on its own."""
    caplog.set_level(logging.DEBUG)
    call, fail = PreTrainedTokenizerFast.__call__, crash(Panic(TEXT))

    def panic_on_rows(self: Any, text: str, **options: Any) -> Any:
        return (fail if CANARY in text else call)(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", panic_on_rows)
    reply = ask(kind)
    assert refusals.read_error(reply.content) == "bad-data"
    printed = capfd.readouterr()
    for text in (bytes_of(reply), caplog.text.encode(), printed.out.encode(), printed.err.encode()):
        assert leaks(text) == []
    assert "client anna: the tokenizer broke down (Panic)" in caplog.text
    os.write(2, b"heard")  # stderr is back in its place
    assert capfd.readouterr().err == "heard"


@pytest.mark.parametrize("place", PLACES[1:], ids=lambda place: place[1])
def test_a_panic_anywhere_is_answered_by_a_code(
    place: tuple[Any, str],
    ask: Callable,
    leaks: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(*place, crash(Panic(TEXT)))
    reply = ask("train")
    assert refusals.read_error(reply.content) == "internal"
    assert leaks(bytes_of(reply) + caplog.text.encode()) == []
    assert "Panic at" in caplog.text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_node_can_be_stopped_while_it_answers(
    stop: type[BaseException], ask: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "encode_or_cause", crash(stop()))
    with pytest.raises(stop):
        ask("train")


def test_an_error_of_fedllm_leaves_as_its_code(
    ask: Callable, leaks: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "draw_rows", crash(NoDataError(TEXT)))
    reply = ask("train")
    assert refusals.read_error(reply.content) == "no-data"
    assert leaks(bytes_of(reply)) == []
