"""Sums that the server only passes on: parties have the adapter that it would have, and it has none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from clients import parties, shared
from clients.handlers import FOR_FEDLLM
from clients.own_adapter import own_adapter
from clients.run_keys import run_keys
from fedllm.adapters.folder import load_adapter
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError, RunFailedError
from fedllm.plan.run_plan import resolve
from fedllm.secure.agreement import Stream
from fedllm.wire import packets
from fedllm.wire.refusals import write_error
from strategies.exchange import last_sums
from strategies.rounds import next_round
from strategies.run import run_federation
from tests.strategies.conftest import NAMES, Run

SHARES = {"secure.method": "shares", "federation.min-clients": 3, "wire.codec": "fp32"}


def lost(*names: str) -> Callable[[Message], list[Message]]:
    """Return a tamper under which the training of some clients fails, once each."""
    left = set(names)

    def tamper(reply: Message) -> list[Message]:
        for name in left & set(reply.content.array_records.get("share-0", {})):
            left.discard(name)
            reply.content = write_error("internal")
        return [reply]

    return tamper


def adapters_of(run: Run, round_num: int) -> dict[str, str]:
    """Return by client the digest of the adapter that its node has after a round."""
    holders = {name: run.holder(client.node_id) for name, client in run.session.clients.items()}
    return {name: own_adapter(holder, name, round_num).digest for name, holder in holders.items()}


def test_parties_have_the_adapter_that_masks_would_give(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding is drawn from a machine's secret and the label; where it is not, all bits are equal."""
    monkeypatch.setattr(parties, "secret_stream", lambda *names: Stream(bytes(16)))
    found = {}
    for method in ("masks", "shares"):
        run = open_run(make_config({**SHARES, "secure.method": method, "run.name": f"same-{method}"}))
        state, first = next_round(run.session, run.state)
        state, second = next_round(run.session, state)
        found[method] = (first.adapter, second.adapter)
    assert found["shares"] == found["masks"]
    assert set(adapters_of(run, 2).values()) == {second.adapter}
    assert state.adapter.digest == run.session.initial.digest, "the server has no adapter but the first"
    assert second.secure is not None
    assert (second.secure.method, second.secure.opened) == ("shares", 3)
    assert (second.weights, second.training.losses, second.training.num_tokens) == ({}, {}, 0)


def test_clients_at_two_nodes_are_refused_before_they_train(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    run = open_run(make_config({**SHARES, "run.name": "two-nodes"}), num_nodes=2)
    with pytest.raises(RunFailedError, match="needs clients at 3 different nodes, and they are at 2"):
        next_round(run.session, run.state)


def test_a_lost_party_does_not_matter_and_goes_on_with_the_others(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    run = open_run(make_config({**SHARES, "run.name": "lost-party"}), tamper=lost("dora"))
    state, record = next_round(run.session, run.state)
    assert (record.attempt, record.accepted) == (1, NAMES[:3])
    assert set(adapters_of(run, 1).values()) == {record.adapter}
    _, record = next_round(run.session, state)
    assert record.accepted == NAMES


def test_a_lost_holder_costs_the_attempt_and_others_hold_the_next(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    asked = []

    def tamper(reply: Message) -> list[Message]:
        opened = reply.content.array_records.get("openings", {})
        if any(len(packets.packet_of(array)) > 32 for array in opened.values()):
            asked.append(set(opened))
            if opened.keys() == {"ben"} and len(asked) < 4:
                reply.content = write_error("internal")
        return [reply]

    run = open_run(make_config({**SHARES, "run.name": "lost-holder"}), tamper=tamper)
    _, record = next_round(run.session, run.state)
    assert "holder ben has not opened its sum" in run.records[0].lost["anna"]
    assert (record.attempt, record.accepted) == (2, NAMES)
    assert {name for one in asked[:3] for name in one} == {"anna", "ben", "cleo"}
    assert {name for one in asked[3:] for name in one} == {"ben", "cleo", "dora"}


def test_a_holder_that_opens_different_sums_ends_the_run(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = shared.open_sum

    def lie(me: str, private: bytes, relay: Any, answered: Any, total: np.ndarray, secret: bytes) -> Any:
        opening = honest(me, private, relay, answered, total, secret)
        if me != "anna":
            return opening
        # To cleo another sum, as if it were that of all: sealed anew, under a key of its own.
        other = honest(me, private, relay, answered, total + np.uint32(1 << 16), secret)
        told = {**opening.boxes, "cleo": other.boxes["cleo"]}
        return replace(opening, boxes=told, content=opening.content)

    def deliver(holder: Any, name: str, asked: Any) -> bytes:
        digest = go_on(holder, name, asked)
        return bytes(32) if name == "cleo" else digest  # what the other sum would have given it

    go_on = shared._go_on
    monkeypatch.setattr(shared, "_go_on", deliver)
    run = open_run(make_config({**SHARES, "run.name": "lie"}))
    with pytest.raises(RunFailedError, match="cleo went on from another adapter than most"):
        next_round(run.session, run.state)


def test_the_server_sees_no_update_sum_or_adapter(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words of parties and of their sum are known here, and nowhere in what passes the server."""
    seen: list[bytes] = []
    words: list[np.ndarray] = []

    def record(reply: Message) -> list[Message]:
        arrays = reply.content.array_records.values()
        seen.extend(packets.packet_of(array) for one in arrays for array in one.values())
        return [reply]

    share, total_of = shared.share, shared.total_of

    def shared_words(me: str, private: bytes, relay: Any, vector: np.ndarray, secret: bytes) -> Any:
        words.append(vector.copy())
        return share(me, private, relay, vector, secret)

    def total_words(*args: Any) -> np.ndarray:
        words.append(total_of(*args).copy())
        return words[-1].copy()

    monkeypatch.setattr(shared, "share", shared_words)
    monkeypatch.setattr(shared, "total_of", total_words)
    run = open_run(make_config({**SHARES, "run.name": "blind"}), tamper=record)
    next_round(run.session, run.state)
    assert len(words) == 8
    everything = b"".join(seen)
    adapter = own_adapter(run.holder(run.session.clients["anna"].node_id), "anna", 1)
    changed = (adapter.vector - run.session.initial.vector).numpy()
    assert np.abs(changed).max() > 0
    for vector in words:
        octets = vector.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
        assert not any(octets[at : at + 9] in everything for at in range(0, len(octets) - 8, 9))
    assert not any(changed[at : at + 2].tobytes() in everything for at in np.flatnonzero(changed)[:200])


def test_one_party_publishes_and_a_resumed_run_goes_on(
    make_config: Callable[..., RunConfig],
    open_run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    overrides = {**SHARES, "run.name": "published", "run.output": str(tmp_path)}
    config = make_config({**overrides, "federation.num-rounds": 2})
    run = open_run(config)
    with monkeypatch.context() as patch:
        patch.setattr(last_sums, "write_over", die)
        with pytest.raises(KeyboardInterrupt):
            run_federation(config, run.grid, resident=run.process.resident)
    # By now no party may have the adapter any more.
    monkeypatch.setattr(last_sums, "_ask", lambda *args: None)
    config = config.override({"run.resume": True})
    state = run_federation(config, run.grid, resident=run.process.resident)
    published = load_adapter(tmp_path / "published" / "adapter").state
    assert published.digest == state.adapter.digest == state.records[-1].adapter
    assert state.records[-1].held_out, "measured at each node, with its own adapter"
    assert state.records[-1].held_out != state.records[0].held_out


def test_who_has_missed_a_round_is_left_out(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    run = open_run(make_config({**SHARES, "run.name": "missed"}))
    state, _ = next_round(run.session, run.state)
    holder = run.holder(run.session.clients["dora"].node_id)
    for file in run_keys(holder.state_path, holder.plan, "dora").folder.glob("round-*"):
        file.unlink()
    _, record = next_round(run.session, state)
    assert record.codes["dora"] == "not-held"
    assert record.accepted == NAMES[:3]


def test_nothing_but_the_last_adapter_is_published(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    from fedllm.wire.shared import PUBLISH, RelayQuestion, write_relay_question

    run = open_run(make_config({**SHARES, "run.name": "early"}))
    next_round(run.session, run.state)
    holder = run.holder(run.session.clients["anna"].node_id)
    asked = RelayQuestion(kind=PUBLISH, round_num=1, clients=("anna",))
    content = write_relay_question(asked, holder.plan.digest)
    context = next(iter(run.grid.contexts.values()))
    assert FOR_FEDLLM["query.unmask"](holder, content, context)["clients"]["codes"] == ["bad-mask"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"federation.cohort": 3}, "federation.cohort"),
        ({"federation.num-clients": 101}, "at most 100"),
        ({"aggregation.optimizer": "fedadam"}, "aggregation.optimizer"),
        (
            {"privacy.epsilon": 8.0, "privacy.unit": "example", "privacy.noise-multiplier": 1.0},
            "privacy.noise-multiplier",
        ),
        ({"privacy.epsilon": 8.0, "privacy.unit": "client", "privacy.trust": "central"}, "privacy.trust"),
    ],
)
def test_what_a_blind_server_cannot_do_is_refused(
    changes: dict[str, Any], named: str, make_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=named):
        resolve(make_config({**SHARES, **changes}))
