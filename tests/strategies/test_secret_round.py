"""Secret sums in rounds of four tiny clients: the sum is that of plain words, whoever is lost on the way."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from clients import masks as client_masks
from clients.client_app import app
from fedllm.adapters.parts import part_size
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError, RunFailedError
from fedllm.secure.masking import plain_sum, sent_bytes
from fedllm.secure.parties import Exchange
from fedllm.secure.vector import NUM_NUMBERS
from fedllm.wire import packets
from scripts.runtimes.local import local_grid
from strategies.flower_strategy import FederatedLora
from strategies.rounds import next_round
from strategies.run import run_federation
from strategies.secure import asked_sums, group_sum
from strategies.session import Watch
from tests.strategies.conftest import NAMES, Run

MASKS = {"secure.method": "masks"}
BEN, CLEO, DORA = 3, 4, 5  # nodes of clients, one each; anna's is 2
Change: TypeAlias = Callable[[RecordDict], None]
Words: TypeAlias = dict[bytes, dict[str, np.ndarray]]


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> Words:
    """Return label -> party -> the words that go under its masks."""
    found: Words = {}
    mask = client_masks.mask

    def spied(name: str, private: bytes, exchange: Exchange, words: np.ndarray, secret: bytes) -> Any:
        found.setdefault(exchange.label, {})[name] = words.copy()
        return mask(name, private, exchange, words, secret)

    monkeypatch.setattr(client_masks, "mask", spied)
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Exchange, tuple[str, ...], np.ndarray]]:
    """Return (exchange, who answered, words) of each sum that is opened."""
    found: list[tuple[Exchange, tuple[str, ...], np.ndarray]] = []
    unmasked = group_sum.unmasked

    def spied(exchange: Exchange, words: np.ndarray, answered: tuple[str, ...], openings: Any) -> Any:
        found.append((exchange, answered, unmasked(exchange, words, answered, openings)))
        return found[-1][2]

    monkeypatch.setattr(group_sum, "unmasked", spied)
    return found


def error(content: RecordDict) -> None:
    content.clear()
    content["error"] = ConfigRecord({"code": "internal"})


def on(changes: Mapping[tuple[str, int], Change], times: int = 1) -> Callable[[Message], list[Message]]:
    """Return a tamper that changes the first replies of a type that a node gives."""
    left = dict.fromkeys(changes, times)

    def tamper(reply: Message) -> list[Message]:
        place = (reply.metadata.message_type.removesuffix(".default"), reply.metadata.src_node_id)
        if left.get(place, 0) and "join" not in place[0]:
            left[place] -= 1
            changes[place](reply.content)
        return [reply]

    return tamper


def flipped(record: str, client: str, at: int) -> Change:
    """Return what flips one bit of an array in a reply."""

    def change(content: RecordDict) -> None:
        data = bytearray(content[record][client].data)
        data[at] ^= 1
        content[record][client] = packets.to_array(bytes(data))

    return change


def test_a_sum_of_masked_words_is_that_of_plain_ones(
    make_config: Callable[..., RunConfig],
    open_run: Callable[..., Run],
    words: Words,
    opened: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asked_sums, "token_bytes", lambda number: bytes(number))
    config = make_config({**MASKS, "federation.num-rounds": 2})
    run = open_run(config)
    state, first = next_round(run.session, run.state)
    state, _ = next_round(run.session, state)
    for exchange, answered, found in opened:
        assert np.array_equal(found, plain_sum([words[exchange.label][name] for name in answered]))
    # The twin reads the plain sum of the same words, which the same labels give again.
    labels = list(words)

    def plain(exchange: Exchange, masked: np.ndarray, answered: tuple[str, ...], openings: Any) -> Any:
        return plain_sum([words[exchange.label][name] for name in answered])

    monkeypatch.setattr(group_sum, "unmasked", plain)
    twin = open_run(config)
    again, _ = next_round(twin.session, twin.state)
    again, _ = next_round(twin.session, again)
    assert list(words) == labels
    assert again.adapter.digest == state.adapter.digest
    assert first.accepted == NAMES
    assert first.secure is not None
    assert (first.secure.parties, first.secure.threshold, first.secure.answered) == (4, 3, 4)


def test_the_record_has_numbers_of_all_and_of_nobody(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    config = make_config({"aggregation.preset": "rolora"})
    plain_run = open_run(config)
    _, plain = next_round(plain_run.session, plain_run.state)
    run = open_run(config.override(MASKS))
    after, record = next_round(run.session, run.state)
    assert record.training.losses == record.training.seconds == {}
    assert len(set(record.weights.values())) == 1
    assert sum(record.weights.values()) == pytest.approx(sum(plain.weights.values()), rel=1e-4)
    assert record.training.loss is not None
    tokens = plain.training.num_tokens
    assert record.training.num_tokens == pytest.approx(tokens, rel=0.02)
    assert plain.aggregation.delta_norm == pytest.approx(record.aggregation.delta_norm, rel=1e-2)
    size = part_size(run.session.layout, "b") + NUM_NUMBERS
    assert record.bytes_up == 4 * sent_bytes(size, 4)
    assert after.num_drawn == dict.fromkeys(NAMES, 4)


@pytest.mark.parametrize(
    ("changes", "answered", "num_opened"),
    [
        ({("train", BEN): error}, ("anna", "cleo", "dora"), 3),
        ({("query.unmask", BEN): error}, NAMES, 3),
        ({("train", BEN): flipped("commitments", "ben", 5)}, NAMES, 4),
    ],
)
def test_a_lost_party_does_not_lose_the_sum(
    changes: dict[tuple[str, int], Change],
    answered: tuple[str, ...],
    num_opened: int,
    make_config: Callable[..., RunConfig],
    open_run: Callable[..., Run],
    words: Words,
    opened: list[Any],
) -> None:
    run = open_run(make_config(MASKS), tamper=on(changes))
    _, record = next_round(run.session, run.state)
    assert (record.attempt, record.accepted) == (1, answered)
    assert record.secure is not None
    assert record.secure.opened == num_opened
    ((exchange, in_sum, found),) = opened
    assert in_sum == answered
    assert np.array_equal(found, plain_sum([words[exchange.label][name] for name in answered]))


def test_below_the_threshold_another_label_is_tried(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run], words: Words
) -> None:
    run = open_run(make_config(MASKS), tamper=on({("train", BEN): error, ("train", CLEO): error}))
    before = run.state.adapter.digest
    after, record = next_round(run.session, run.state)
    failed, applied = run.records
    assert (failed.applied, failed.adapter, failed.accepted) == (False, before, ())
    assert failed.codes["anna"] == "too-few-parties"
    assert "2 of 4 parties answered, 3 are needed" in failed.lost["anna"]
    assert (applied.attempt, applied.accepted, record) == (2, NAMES, applied)
    assert len(words) == 2
    assert after.adapter.digest != before


def test_a_sum_that_is_not_opened_changes_nothing(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    changes = {("query.unmask", BEN): error, ("query.unmask", CLEO): error}
    run = open_run(make_config({**MASKS, "federation.max-retries": 1}), tamper=on(changes, times=2))
    with pytest.raises(RunFailedError, match="2 parties opened shares, and 3 are needed"):
        next_round(run.session, run.state)
    assert [record.applied for record in run.records] == [False, False]
    assert "client reports internal" in " ".join(run.notices)


def test_wrong_shares_name_their_party(
    make_config: Callable[..., RunConfig],
    open_run: Callable[..., Run],
    words: Words,
    opened: list[Any],
) -> None:
    run = open_run(make_config(MASKS), tamper=on({("query.unmask", BEN): flipped("openings", "ben", 0)}))
    _, record = next_round(run.session, run.state)
    assert record.secure is not None
    assert record.secure.faults == {"ben": "ben opened a wrong share of anna"}
    assert record.secure.opened == 3
    assert "ben opened a wrong share of anna" in run.notices
    ((exchange, _, found),) = opened
    assert np.array_equal(found, plain_sum(list(words[exchange.label].values())))


def test_boxes_that_do_not_open_cost_their_party_the_round(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    def damage(content: RecordDict) -> None:
        content["boxes"]["ben"] = packets.to_array(bytes(len(content["boxes"]["ben"].data)))

    run = open_run(make_config(MASKS), tamper=on({("train", BEN): damage}))
    state, record = next_round(run.session, run.state)
    failed = run.records[0]
    assert failed.secure is not None
    assert failed.secure.faults == {
        "ben": "the boxes of ben do not open at anna, ben, cleo, dora: the sum is lost"
    }
    assert (record.attempt, record.asked) == (2, ("anna", "cleo", "dora"))
    _, later = next_round(run.session, state)
    assert later.asked == NAMES


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["masked"].update(ben=packets.to_array(bytes(9))),
        lambda content: content["boxes"].update(ben=packets.to_array(bytes(4))),
        lambda content: content.update(updates=ArrayRecord({"ben": packets.to_array(bytes(4))})),
        lambda content: content["masked"].update(cleo=content["masked"]["ben"]),
        flipped("masked", "ben", 0),
    ],
)
def test_a_forged_answer_costs_nobody_else_the_round(
    change: Change, make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    run = open_run(make_config(MASKS), tamper=on({("train", BEN): change}))
    _, record = next_round(run.session, run.state)
    assert record.attempt == 1
    assert {"anna", "cleo", "dora"} <= set(record.accepted)


def test_nodes_sum_their_clients_before_they_mask(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run], words: Words, opened: list[Any]
) -> None:
    flat = {**MASKS, "wire.node-sum": True, "aggregation.preset": "rolora"}
    run = open_run(make_config(flat), num_nodes=3)
    _, record = next_round(run.session, run.state)
    assert record.accepted == NAMES
    assert record.secure is not None
    assert (record.secure.parties, record.secure.answered) == (3, 3)
    ((exchange, answered, found),) = opened
    assert np.array_equal(found, plain_sum([words[exchange.label][name] for name in answered]))
    alone = open_run(make_config({"aggregation.preset": "rolora"}))
    _, plain = next_round(alone.session, alone.state)
    assert plain.aggregation.delta_norm == pytest.approx(record.aggregation.delta_norm, rel=1e-2)


def test_all_clients_of_a_node_that_broke_the_protocol_sit_out(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    def cut(content: RecordDict) -> None:
        (party,) = content["masked"]
        content["masked"][party] = packets.to_array(bytes(9))

    run = open_run(make_config({**MASKS, "wire.node-sum": True}), num_nodes=3)
    node, clients = next(one for one in run.session.by_node(NAMES).items() if len(one[1]) == 2)
    run.grid.tamper = on({("train", node): cut})
    _, record = next_round(run.session, run.state)
    assert len(record.accepted) == 2
    assert run.session.barred == dict.fromkeys(clients, 1)


def test_vectors_of_nobody_who_was_asked_cost_the_attempt(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    def of_others(content: RecordDict) -> None:
        content["clients"]["ids"] = [f"other-{name}" for name in NAMES]

    run = open_run(make_config(MASKS), tamper=on({("train", 2): of_others}), num_nodes=1)
    _, record = next_round(run.session, run.state)
    assert "a vector of none of the clients that have trained" in run.records[0].lost["anna"]
    assert (record.attempt, record.accepted) == (2, NAMES)


@pytest.mark.parametrize("method", ["masks", "shares"])
def test_a_round_that_asks_nobody_fails_in_a_line(
    method: str, make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    flat = {"secure.method": method, "run.name": f"nobody-{method}", "federation.max-retries": 0}
    run = open_run(make_config(flat))
    run.session.barred.update(dict.fromkeys(NAMES, 1))
    with pytest.raises(RunFailedError, match="round 1 failed once"):
        next_round(run.session, run.state)


def test_clients_of_one_node_are_parties_each(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    run = open_run(make_config(MASKS), num_nodes=2)
    _, record = next_round(run.session, run.state)
    assert record.secure is not None
    assert (record.accepted, record.secure.parties, record.secure.opened) == (NAMES, 4, 4)


def test_many_parties_are_summed_in_groups(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = asked_sums.in_groups

    def in_two(parties: Any, label: bytes) -> list[Exchange]:
        (one,) = whole(parties, label)
        return [Exchange(label, one.parties[:2]), Exchange(bytes(32), one.parties[2:])]

    monkeypatch.setattr(asked_sums, "in_groups", in_two)
    monkeypatch.setattr("clients.parties.check_parties", lambda *args, **more: None)  # two would be too few
    run = open_run(make_config(MASKS))
    _, record = next_round(run.session, run.state)
    assert record.secure is not None
    assert (record.accepted, record.secure.parties, record.secure.threshold) == (NAMES, 4, 4)


def test_a_server_that_dies_between_the_exchanges_has_a_new_label(
    make_config: Callable[..., RunConfig],
    open_run: Callable[..., Run],
    words: Words,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def die(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    config = make_config({**MASKS, "run.output": str(tmp_path)})
    with monkeypatch.context() as patch:
        patch.setattr(group_sum.GroupSum, "question", die)
        killed = open_run(config)
        with pytest.raises(KeyboardInterrupt):
            next_round(killed.session, killed.state)
    resumed = open_run(config)
    _, record = next_round(resumed.session, resumed.state)
    assert (record.attempt, record.accepted) == (1, NAMES)
    first, second = words.values()
    assert all(not np.array_equal(first[name], second[name]) for name in NAMES), "rounded anew"


def test_flowers_own_loop_has_no_second_exchange(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    run = open_run(make_config(MASKS))
    with pytest.raises(ConfigError, match=r"secure\.method: Flower's own round loop"):
        FederatedLora(make_config(MASKS)).configure_train(1, ArrayRecord(), ConfigRecord(), run.grid)


def test_a_run_ends_its_keys_and_says_what_it_hid(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    flat = {**MASKS, "run.output": str(tmp_path), "federation.num-rounds": 1, "evaluation.every": "ends"}
    config, notices = make_config(flat), list[str]()
    run_federation(config, local_grid(config, app, num_nodes=2), Watch(notice=notices.append))
    folder = tmp_path / "run"
    assert not list((folder / "private").rglob("key"))
    card = " ".join((folder / "adapter" / "README.md").read_text().split())
    assert "## What the server saw" in card
    result = json.loads((folder / "result.json").read_text())
    assert result["secure"] == {"method": "masks", "min_parties": 3, "clients": 4, "pinned": 0}
    assert "0 of 4 data holders say that their site runs only code it has pinned" in card
    assert any("4 of 4 clients run whatever code the server ships" in line for line in notices)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert rounds[-1]["secure"]["answered"] == 4
