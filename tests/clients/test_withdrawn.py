"""A site that has withdrawn: every question is refused before anything is opened, whoever asks and how."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from clients.gate import LOG, Sender
from clients.process import Process
from clients.withdrawn import FILE, withdraw
from fedllm.chained_log import read_entries
from fedllm.engine.interruption import watched_steps
from fedllm.errors import ConfigError, PolicyError
from fedllm.identity import new_key, public_text
from fedllm.site_policy import load_policy
from fedllm.wire.refusals import read_withdrawn, write_withdrawn
from fedllm.withdrawal import Withdrawal, read_withdrawal
from tests.clients.hostile import Hostile

REASON = "the ethics board has said so"


@pytest.fixture
def owner(site: Callable, hostile: Callable, tmp_path: Path) -> Callable[[str], bytes]:
    """Return a function (node) by which the owner of this machine withdraws; ward has the rows asked for."""
    public = public_text(new_key(tmp_path / "site.key"))
    nodes = "".join(f'[nodes.{name}]\ndata = "{name}.jsonl"\n' for name in ("ward", "lab"))
    site(f'key = "site.key"\n{nodes}')

    def do(node: str) -> bytes:
        policy = load_policy()
        record = withdraw(policy, node, REASON, policy.state_folder / LOG)
        assert read_withdrawal(record).site == public
        return record

    return do


@pytest.mark.parametrize("node", ["", "ward"])
def test_every_question_is_refused_and_nothing_opened(
    node: str, owner: Callable, hostile: Callable, tmp_path: Path
) -> None:
    asking = hostile()
    asking.holder()  # what a server must have to ask at all, made before
    record = owner(node)
    for process in (Process(), Process()):  # as after a restart
        server = replace(asking, process=process)
        asked = [server.reply(kind, RecordDict()) for kind in ("query.join", "query.unmask", "query.overlap")]
        assert asked == ["withdrawn"] * 3
        assert process.holders == {}
    server = asking
    assert [server.train(), server.evaluate(), server.adapt(), server.stock("train")] == ["withdrawn"] * 4
    codes = [entry["code"] for entry in read_entries(tmp_path / "state" / LOG) if "code" in entry]
    assert codes == ["withdrawn"] * 10
    assert read_withdrawal(record).clients == ((node,) if node else ())


def test_the_answer_is_the_signed_record_without_the_reason(owner: Callable, hostile: Callable) -> None:
    record = owner("ward")
    reply = hostile().message("query.join", RecordDict())
    assert reply == write_withdrawn(record)
    assert read_withdrawn(reply) == record
    assert REASON not in str(reply)
    assert read_withdrawal(record).covers(read_withdrawal(record).site, "ward")
    (told,) = (entry for entry in read_entries(load_policy().state_folder / LOG) if "event" in entry)
    assert (told["event"], told["node"], told["reason"]) == ("withdrawn", "ward", REASON)


def test_the_same_rows_under_other_names_are_withdrawn_too(
    owner: Callable, hostile: Callable, tmp_path: Path
) -> None:
    owner("ward")
    renamed = hostile(Sender(node="north"))
    renamed = replace(renamed, node={**renamed.node, "client-id": "north"})
    assert renamed.join() == "withdrawn"
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "ward.jsonl")
    assert replace(renamed, node={**renamed.node, "data-path": str(link)}).join() == "withdrawn"


def test_another_node_goes_on(owner: Callable, hostile: Callable) -> None:
    owner("lab")
    assert isinstance(hostile(Sender(node="ward")).train(), RecordDict)


def test_training_that_goes_on_ends_before_its_next_step(owner: Callable, hostile: Callable) -> None:
    server: Hostile = hostile(**{"train.local-steps": 3})
    done = []

    def watch(num_done: int, num_steps: int) -> None:
        done.append(num_done)
        if num_done == 1:
            owner("ward")

    with watched_steps(watch):
        assert server.train() == "withdrawn"
    assert done == [0, 1]


def test_an_answer_that_was_ready_does_not_leave(
    owner: Callable, hostile: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Hostile = hostile()
    server.holder()
    with watched_steps(lambda num_done, num_steps: owner("") if num_done == num_steps - 1 else None):
        assert server.train() == "withdrawn"


def test_a_damaged_list_lets_nothing_leave(owner: Callable, hostile: Callable, caplog: Any) -> None:
    owner("lab")
    file = load_policy().state_folder / FILE
    for content in ("", "{}x", '[{"node": "lab"}]', "[3]"):
        file.write_text(content)
        assert hostile().join() == "policy"
        assert f"{file} cannot be read, so nothing leaves" in caplog.text
        with pytest.raises(PolicyError, match="restore it"):
            owner("ward")
        assert file.read_text() == content


def test_withdrawals_add_up(owner: Callable) -> None:
    records = [owner(node).decode() for node in ("lab", "ward")]
    kept = json.loads((load_policy().state_folder / FILE).read_text())
    assert [one["record"] for one in kept] == records


def test_without_a_key_or_a_node_nothing_is_written(site: Callable, tmp_path: Path) -> None:
    for text, node, error, why in (
        ("", "", ConfigError, r"\[site\] key must be set"),
        ('key = "site.key"', "nowhere", PolicyError, r"no \[nodes.nowhere\]"),
        ('key = "site.key"', "", ConfigError, "fedllm keys new"),
    ):
        site(text)
        with pytest.raises(error, match=why):
            withdraw(load_policy(), node, "", tmp_path / "log")
    assert not (tmp_path / "state").exists()


def test_a_withdrawal_names_no_client_of_a_whole_site(owner: Callable) -> None:
    found: Withdrawal = read_withdrawal(owner(""))
    assert (found.clients, found.covers(found.site, "anybody")) == ((), True)
