"""Encrypted sums in rounds of four clients: each is that of plain words, and one party can decrypt it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from clients import parties, train_parties
from clients.encrypted import answer_decrypt
from clients.run_keys import run_keys
from fedllm.config.run_config import RunConfig
from fedllm.errors import RunFailedError
from fedllm.secure.agreement import Stream
from fedllm.secure.homomorphic import encrypt, new_keys
from fedllm.secure.masking import plain_sum
from fedllm.wire import encrypted, packets
from fedllm.wire.refusals import write_error
from strategies.rounds import next_round
from strategies.secure import encrypted_sum
from strategies.secure.group_sum import read_honest
from tests.strategies.conftest import NAMES, Run

pytest.importorskip("tenseal", reason="pip install 'fedllm[he]'")
HE = {"secure.method": "he", "wire.codec": "fp32", "federation.min-clients": 3}
ADDED: dict[bytes, dict[str, np.ndarray]] = {}  # label -> party -> the words that it encrypted
OPENED: list[np.ndarray] = []  # the words of every sum that was opened


@pytest.fixture(autouse=True)
def spied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is encrypted and what comes out."""
    party_words = train_parties.party_words

    def words_of(holder: Any, request: Any, party: Any, updates: Any) -> np.ndarray:
        words = party_words(holder, request, party, updates)
        ADDED.setdefault(party.asked.exchange.label, {})[party.name] = words.copy()
        return words

    def read(words: np.ndarray, *rest: Any) -> Any:
        OPENED.append(words.copy())
        return read_honest(words, *rest)

    monkeypatch.setattr(train_parties, "party_words", words_of)
    monkeypatch.setattr(encrypted_sum, "read_honest", read)
    ADDED.clear()
    OPENED.clear()


def tampered(message_type: str, change: Callable[[Message], None]) -> Callable[[Message], list[Message]]:
    """Return a tamper that changes each reply to one type of message."""

    def tamper(reply: Message) -> list[Message]:
        if reply.metadata.message_type.startswith(message_type):
            change(reply)
        return [reply]

    return tamper


def lost(*names: str) -> Callable[[Message], None]:
    """Return what makes the training of some clients fail, once each."""
    left = set(names)

    def change(reply: Message) -> None:
        for name in left & set(reply.content.array_records.get("encrypted", {})):
            left.discard(name)
            reply.content = write_error("internal")

    return change


@pytest.mark.parametrize("gone", [(), ("dora",)])
def test_the_sum_has_the_bits_of_plain_words(
    gone: tuple[str, ...], make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    run = open_run(make_config(HE), tamper=tampered("train", lost(*gone)))
    state, record = next_round(run.session, run.state)
    assert record.accepted == tuple(name for name in NAMES if name not in gone)
    (words,) = ADDED.values()
    assert np.array_equal(OPENED[0], plain_sum([words[name] for name in record.accepted]))
    assert state.adapter.digest != run.state.adapter.digest
    assert record.secure is not None
    assert (record.secure.method, record.secure.opened) == ("he", 1)
    assert not record.training.losses


def test_masks_and_encryption_give_one_adapter(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding is drawn from a machine's secret and the label; where it is not, all bits are equal."""
    monkeypatch.setattr(parties, "secret_stream", lambda *names: Stream(bytes(16)))
    digests = set()
    for method in ("masks", "he"):
        run = open_run(make_config({**HE, "secure.method": method, "run.name": method}))
        state, _ = next_round(run.session, run.state)
        state, _ = next_round(run.session, state)
        digests.add(state.adapter.digest)
    assert len(digests) == 1


def test_a_lost_key_holder_costs_the_attempt(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    run = open_run(make_config(HE), tamper=tampered("train", lost("anna")))
    _, record = next_round(run.session, run.state)
    failed = run.records[0]
    assert not failed.applied
    assert "key holder anna" in failed.lost["ben"]
    assert (record.attempt, record.accepted) == (2, NAMES)
    assert len(ADDED) == 2


def test_words_of_another_size_are_the_key_holders_fault(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    def cut(reply: Message) -> None:
        record = reply.content.array_records["openings"]
        record["anna"] = packets.to_array(packets.packet_of(record["anna"])[:-3])

    run = open_run(make_config({**HE, "federation.max-retries": 0}), tamper=tampered("query.unmask", cut))
    with pytest.raises(RunFailedError):
        next_round(run.session, run.state)
    (record,) = run.records
    assert record.secure is not None
    assert list(record.secure.faults) == ["anna"]


def test_a_bad_ciphertext_is_left_out_and_named(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    def spoil(reply: Message) -> None:
        record = reply.content.array_records["encrypted"]
        if "cleo" in record:
            record["cleo"] = packets.to_array(packets.packet_of(record["cleo"])[:-100])

    run = open_run(make_config(HE), tamper=tampered("train", spoil))
    _, record = next_round(run.session, run.state)
    assert record.accepted == ("anna", "ben", "dora")
    assert record.secure is not None
    assert list(record.secure.faults) == ["cleo"]
    (words,) = ADDED.values()
    assert np.array_equal(OPENED[0], plain_sum([words[name] for name in record.accepted]))


def test_a_key_of_the_servers_own_is_refused(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, honest = new_keys(), encrypted.add_key_holders

    def add(content: RecordDict, holders: Any) -> None:
        honest(content, [encrypted.KeyHolder(holder.name, keys.public) for holder in holders])

    monkeypatch.setattr("strategies.secure.methods.add_key_holders", add)
    run = open_run(make_config({**HE, "federation.max-retries": 0}))
    with pytest.raises(RunFailedError):
        next_round(run.session, run.state)
    assert set(run.records[0].codes.values()) == {"bad-parties"}
    assert not ADDED


def test_a_second_ciphertext_under_a_label_is_not_decrypted(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    """A server that has the sum may not have an update decrypted as well."""
    run = open_run(make_config(HE))
    next_round(run.session, run.state)
    holder, (label,) = run.holder(run.session.clients["anna"].node_id), ADDED
    public = run_keys(holder.state_path, holder.plan, "anna").encryption.public
    asked = encrypted.Decrypting(
        label=label, key_holder="anna", answered=NAMES, content=encrypt(public, ADDED[label]["ben"], 24)
    )
    content = encrypted.write_decrypt([asked], round_num=1, plan_digest=holder.plan.digest)
    assert list(answer_decrypt(holder, content)["clients"]["codes"]) == ["mask-reuse"]


def test_the_server_sees_no_secret_key(
    make_config: Callable[..., RunConfig], open_run: Callable[..., Run]
) -> None:
    seen: list[bytes] = []

    def record(reply: Message) -> list[Message]:
        arrays = reply.content.array_records.values()
        seen.extend(packets.packet_of(array) for one in arrays for array in one.values())
        return [reply]

    run = open_run(make_config(HE), tamper=record)
    next_round(run.session, run.state)
    for name in NAMES:
        holder = run.holder(run.session.clients[name].node_id)
        keys = run_keys(holder.state_path, holder.plan, name).encryption
        assert keys.public in seen
        assert not any(keys.secret[-1000:] in content for content in seen)
