"""Screening over a federation: copies of private text are refused, fresh text passes, silence refuses all."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message
from flwr.common.serde import message_to_proto

from fedllm.attacks.token_scores import whole
from fedllm.data.fields import Example, Turn
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining
from fedllm.models.base import layout_of, load_base, load_tokenizer
from fedllm.models.chat import Encoded, encode, form_tokens
from fedllm.models.files import resolve_model
from fedllm.originality.verdict import tokens_digest
from strategies.distillation.originality import known_to_one, screen


@pytest.fixture
def encode_text(make_config: Callable) -> Callable[..., Encoded]:
    """Return a function (prompt, answer) -> the row that a generator would give."""
    tokenizer = load_tokenizer(resolve_model(make_config().model.name))

    def make(prompt: str, answer: str) -> Encoded:
        row = encode(Example((Turn("user", prompt), Turn("assistant", answer))), tokenizer, 256)
        assert row is not None
        return row

    return make


def private_rows(run: Any) -> dict[str, list[Encoded]]:
    """Return the rows of every client of a run, as its node holds them."""
    found = {}
    for node in run.grid.get_node_ids():
        for client in run.holder(node).clients.values():
            found[client.client_id] = [*client.train, *client.held_out]
    return found


FRESH = tuple(
    f"{word} the {other} while {third} stays quite open"
    for word, other, third in (
        ("Paint", "garden", "winter"),
        ("Carry", "ladder", "window"),
        ("Measure", "harbour", "morning"),
    )
)


def test_a_copy_of_a_row_is_refused_and_fresh_text_passes(
    make_config: Callable, open_run: Callable, encode_text: Callable
) -> None:
    run = open_run(make_config())
    rows = private_rows(run)
    copies = [whole(own[0].tokens) for own in rows.values()]
    fresh = [encode_text(text, text[::-1]) for text in FRESH]
    verdicts = screen(run.session, [*copies, *fresh], round_num=1)
    assert [one.overlap for one in verdicts] == [False] * 4 + [True] * 3
    assert [one.passed for one in verdicts] == [False] * 4 + [True] * 3
    assert [one.digest for one in verdicts] == [tokens_digest(row.tokens) for row in (*copies, *fresh)]
    assert all(one.num_matched == one.num_shingles for one in verdicts[:4])
    assert all(one.membership is None for one in verdicts)


def test_copies_within_and_of_public_text_are_refused(
    make_config: Callable, open_run: Callable, encode_text: Callable
) -> None:
    run = open_run(make_config())
    fresh = [encode_text(text, text[::-1]) for text in FRESH]
    verdicts = screen(
        run.session,
        [fresh[0], fresh[0], fresh[1], fresh[2]],
        round_num=1,
        public=[fresh[1]],
        known=[False, False, False, True],
    )
    assert [one.duplicate for one in verdicts] == [True, False, False, True]
    assert [one.membership for one in verdicts] == [True, True, True, False]
    assert [one.passed for one in verdicts] == [True, False, False, False]


def test_what_all_texts_have_by_their_form_refuses_none(
    make_config: Callable, open_run: Callable, encode_text: Callable
) -> None:
    run = open_run(make_config())
    form = form_tokens(load_tokenizer(resolve_model(run.session.config.model.name)))
    assert len(form) >= 4  # two roles and two ends
    (verdict,) = screen(run.session, [encode_text(FRESH[0], FRESH[1])], round_num=1, boilerplate=form)
    assert verdict.passed


def test_no_text_passes_where_a_node_does_not_answer(
    make_config: Callable, open_run: Callable, encode_text: Callable
) -> None:
    def mute(reply: Message) -> list[Message]:
        if reply.metadata.message_type == "query.overlap" and reply.metadata.src_node_id == nodes[0]:
            reply.content["note"] = ConfigRecord({"text": "x"})
        return [reply]

    nodes = [0]
    run = open_run(make_config(), tamper=mute)
    nodes[0] = run.session.clients["ben"].node_id
    fresh = [encode_text(text, text[::-1]) for text in FRESH]
    verdicts = screen(run.session, fresh, round_num=1)
    assert [(one.overlap, one.passed) for one in verdicts] == [(None, False)] * 3
    assert any("did not check synthetic text" in notice for notice in run.notices)
    # Where ben's text cannot be in them, his node need not be asked.
    verdicts = screen(run.session, fresh, round_num=2, clients=["anna", "cleo"])
    assert all(one.passed for one in verdicts)


def test_a_second_query_in_a_round_passes_nothing(
    make_config: Callable, open_run: Callable, encode_text: Callable
) -> None:
    run = open_run(make_config())
    fresh = [encode_text(text, text[::-1]) for text in FRESH]
    assert all(one.passed for one in screen(run.session, fresh, round_num=2))
    assert not any(one.passed for one in screen(run.session, fresh, round_num=2))
    assert any("query-limit" in notice for notice in run.notices)


def test_replies_hold_counts_and_no_text(
    make_config: Callable, open_run: Callable, encode_text: Callable
) -> None:
    seen: list[Message] = []

    def watch(reply: Message) -> list[Message]:
        seen.append(reply)
        return [reply]

    run = open_run(make_config(), tamper=watch)
    seen.clear()
    screen(run.session, [whole(own[0].tokens) for own in private_rows(run).values()], round_num=1)
    assert len(seen) == 4
    for reply in seen:
        assert list(reply.content) == ["metrics"]
        data = message_to_proto(reply).SerializeToString()
        assert not any(text in data for text in (b"Return", b"sum", b"anna", b"ben", b"rows.jsonl"))


def test_nothing_to_screen_asks_nobody(make_config: Callable, open_run: Callable) -> None:
    run = open_run(make_config())
    before = run.session.transport.bytes_down
    assert screen(run.session, [], round_num=1) == ()
    assert run.session.transport.bytes_down == before


def test_what_one_clients_adapter_has_memorised_is_known_to_one(make_config: Callable) -> None:
    config = make_config({"lora.rank": 8, "lora.alpha": 16.0, "lora.target-modules": "all-linear"})
    base = load_base(config.model)
    engine = Engine(base, layout_of(base.model, config.lora, base.fingerprint))
    draw = random.Random(0)
    texts = [whole([draw.randrange(5, 300) for _ in range(24)]) for _ in range(12)]
    training = LocalTraining(steps=40, batch_size=1, learning_rate=0.02, weight_decay=0.0, clip_norm=1.0)
    start = 0.1 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(0))
    jobs = [Job(name, start, ((row,),) * 40, training) for name, row in zip("ab", texts[:2], strict=True)]
    adapters = [start + result.delta for result in engine.train(jobs)]
    assert known_to_one(engine, adapters, texts) == (True, True) + (False,) * 10
