"""A site's service over a real socket: who is answered, what with, one after the other, and not in vain."""

import asyncio
import json
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict

from clients import messenger
from clients.answering import answer
from clients.gate import Sender
from clients.kinds import make_app
from clients.messenger import carry, connected
from clients.process import Process
from clients.service import Service, make_server, serve
from clients.site_protocol import HEADERS, SOCKET, TICKET, digest_of
from clients.tickets import Tickets
from clients.withdrawn import withdraw
from fedllm.chained_log import read_entries
from fedllm.config.run_config import RunConfig
from fedllm.errors import FedLLMError
from fedllm.identity import new_key
from fedllm.site_policy import load_policy
from fedllm.wire import refusals, requests
from fedllm.wire.joining import write_question
from fedllm.wire.stock import write_plain
from scripts.runtimes.local import local_grid
from tests.builders import train_request
from tests.site_builder import wait_for, write_site

SERVER, BUNDLE = "127.0.0.1:9", "b" * 64
KEYS = {name: f"launch key of {name}" for name in ("anna", "ben")}


@dataclass(eq=False)
class Door:
    """A running service, and a server's questions to its nodes."""

    config: RunConfig
    socket: str
    service: Service
    folder: Path
    tickets: list[str] = field(default_factory=list)

    def ticket(self, node: str = "anna", bundle: str = BUNDLE) -> str:
        sender = Sender(server=SERVER, node=node, bundle=bundle)
        return self.service.tickets.issue(sender)

    def send(self, kind: str, content: RecordDict, ticket: str, config: RunConfig | None = None) -> Message:
        variables = {SOCKET: self.socket, TICKET: ticket}
        return self.ask(partial(carry, variables=variables), kind, content, config)

    def ask(
        self, answer_with: Any, kind: str, content: RecordDict, config: RunConfig | None = None
    ) -> Message:
        grid = local_grid(config or self.config, make_app(answer_with))
        (node,) = grid.get_node_ids()
        grid.contexts[node].node_config = load_policy().node_config("anna")
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, node, group_id="1")])
        return reply

    def train(self, config: RunConfig | None = None) -> RecordDict:
        holder = Process().open((config or self.config).to_flat(), load_policy().node_config("anna"))
        return requests.write_train_request(train_request(holder, "anna"), requests.Sending())

    def health(self) -> dict[str, Any]:
        with connected(self.socket) as client:
            told: dict[str, Any] = client.get("/v1/health").json()
            return told


def code_of(reply: Message) -> str | None:
    return reply.error.reason if reply.has_error() else refusals.read_error(reply.content)


@pytest.fixture
def open_door(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Door]]:
    """Return a function (tables of site.toml) -> a service on a socket, in a thread of this process."""
    folder = Path(tempfile.mkdtemp(prefix="site-"))  # a short name: the system limits a socket's path
    ends: list[Callable[[], None]] = []

    def open_it(**tables: Any) -> Door:
        config = make_config()
        nodes = {name: {"model-path": config.model.name} for name in KEYS}
        monkeypatch.setenv("FEDLLM_SITE", str(write_site(folder, SERVER, nodes, **tables)))
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(folder / "s"))
        listening.listen()
        service = Service(Process(), Tickets({digest_of(key): name for name, key in KEYS.items()}))
        server = make_server(service)
        thread = threading.Thread(target=lambda: asyncio.run(serve(server, service, listening)))
        thread.start()

        def end() -> None:
            server.should_exit = True
            thread.join()
            listening.close()

        ends.append(end)
        return Door(config, str(folder / "s"), service, folder)

    yield open_it
    for end in ends:
        end()
    shutil.rmtree(folder)


def test_a_messenger_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, clients.client_app, clients.launcher;"
        " import flwr.supernode.runtime.run_clientapp;"
        " print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_the_service_answers_as_the_node_itself_would(open_door: Callable[..., Door]) -> None:
    door = open_door()
    direct = partial(answer, Process(), sender=Sender(server=SERVER, node="anna", bundle=BUNDLE))
    for kind, content in (("query.join", RecordDict()), ("train", door.train())):
        here, there = door.ask(direct, kind, content), door.send(kind, content, door.ticket())
        assert code_of(there) is None
        seconds = [reply.content.metric_records["metrics"].pop("seconds", None) for reply in (here, there)]
        assert (seconds[0] is None) == (kind != "train")
        assert here.content == there.content, kind


def test_a_question_without_a_ticket_of_its_own_is_not_answered(open_door: Callable[..., Door]) -> None:
    door = open_door()
    used = door.ticket()
    assert code_of(door.send("query.join", RecordDict(), used)) is None
    for ticket in (used, "", "guessed", KEYS["anna"]):
        assert code_of(door.send("query.join", RecordDict(), ticket)) == "site-away"
    arrays = RecordDict(
        {"arrays": write_plain(Process().open(door.config.to_flat(), {"server-paths": True}).initial)}
    )
    stock = door.send("train", arrays, "guessed")
    assert stock.has_error(), "a stock strategy reads errors alone"
    assert stock.error.reason == "site-away"


def ask_for_ticket(door: Door, key: str, headers: dict[str, str] | None = None, **told: str) -> str:
    """Return "ok", or the code of what the service says to a launcher."""
    body = {"bundle": BUNDLE, "version": HEADERS["fedllm-version"], **told}
    with connected(door.socket) as client:
        client.headers.update(headers or {})
        try:
            ticket = messenger.post(client, "/v1/ticket", key, json=body).json()["ticket"]
        except FedLLMError as error:
            return error.code if "\n" not in str(error) else str(error)
    assert code_of(door.send("query.join", RecordDict(), ticket)) is None
    return "ok"


def test_only_a_launcher_of_this_site_gets_a_ticket(open_door: Callable[..., Door]) -> None:
    door = open_door(allow={"bundles": [BUNDLE]})
    assert ask_for_ticket(door, KEYS["ben"]) == "ok"
    assert ask_for_ticket(door, "another key") == "site-away"
    assert ask_for_ticket(door, KEYS["ben"], bundle="c" * 64) == "policy"
    *_, last = read_entries(load_policy().state_folder / "log.jsonl")
    assert (last["node"], last["bundle"], last["code"]) == ("ben", "c" * 64, "policy")


def test_what_is_no_question_is_refused_and_logged(open_door: Callable[..., Door]) -> None:
    door = open_door()
    unknown = Message(RecordDict(), dst_node_id=1, message_type="train.other")
    other = messenger.write_question(
        messenger.Carried(message=unknown, run_id=1, node_id=1, run_config={"run.name": "x"})
    )
    for content in (b"", bytes(100), other):
        ticket = door.ticket()
        with connected(door.socket) as client:
            told = client.post("/v1/answer", content=content, headers={"authorization": f"Bearer {ticket}"})
        assert told.json()["refused"] == "bad-packet"
        *_, last = read_entries(load_policy().state_folder / "log.jsonl")
        assert (last["node"], last["code"]) == ("anna", "bad-packet")


def test_a_node_whose_rows_lie_elsewhere_is_refused_and_logged(open_door: Callable[..., Door]) -> None:
    door = open_door(site={"data-root": "elsewhere"})
    with connected(door.socket) as client:
        question = messenger.Carried(
            message=Message(RecordDict(), dst_node_id=1, message_type="query.join"),
            run_id=1,
            node_id=1,
            run_config=door.config.to_flat(),
        )
        code, _ = messenger._answer(client, messenger.write_question(question), door.ticket())
    assert code == "policy"
    *_, last = read_entries(load_policy().state_folder / "log.jsonl")
    assert (last["node"], last["code"]) == ("anna", "policy")


def test_two_versions_do_not_talk_to_each_other(open_door: Callable[..., Door]) -> None:
    door = open_door()
    assert ask_for_ticket(door, KEYS["anna"], {"fedllm-protocol": "0"}) == "other-version"
    assert ask_for_ticket(door, KEYS["anna"], {"fedllm-version": "0.0.1"}) == "other-version"
    assert ask_for_ticket(door, KEYS["anna"], version="0.0.1") == "other-version"
    assert ask_for_ticket(door, KEYS["anna"], version="") == "ok", (
        "another publisher's app, of its own version"
    )


def begin(door: Door, config: RunConfig, client: httpx.Client) -> Iterator[str]:
    """Begin a training that takes very long, and return the lines of its answer that are to come."""
    sent: list[bytes] = []

    def keep(message: Message, context: Any) -> Message:
        asked = messenger.Carried(
            message=message, run_id=1, node_id=context.node_id, run_config=context.run_config
        )
        sent.append(messenger.write_question(asked))
        return Message(RecordDict(), reply_to=message)

    door.ask(keep, "train", door.train(config), config)
    headers = {"authorization": f"Bearer {door.ticket()}"}
    request = client.build_request("POST", "/v1/answer", headers=headers, content=sent[0])
    response = client.send(request, stream=True)
    lines = response.iter_lines()
    while json.loads(next(lines)).get("step", 0) < 2:
        pass
    return lines


def test_nobody_waiting_ends_the_work_between_two_steps(
    open_door: Callable[..., Door], make_config: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    door = open_door()
    endless = make_config(**{"train.local-steps": 3_000})
    client = connected(door.socket)
    lines = begin(door, endless, client)
    waiting = threading.Thread(target=door.send, args=("query.join", RecordDict(), door.ticket("ben")))
    waiting.start()
    wait_for(lambda: door.health()["waiting"] == 1, "one answer at a time")
    assert door.health()["answering"] == 1
    with caplog.at_level(logging.ERROR):
        del lines  # which closes the connection, as a messenger's end does
        client.close()
        waiting.join(60)
        assert not waiting.is_alive(), "the next in the queue is answered"
    assert "cancelled: nobody waits for the answer; stopped before step" in caplog.text
    assert code_of(door.send("train", door.train(), door.ticket())) is None, "and the engine goes on"


def test_the_model_is_unloaded_when_nothing_is_asked(open_door: Callable[..., Door]) -> None:
    door = open_door(site={"idle-minutes": 0.005})
    first = door.send("train", door.train(), door.ticket())
    assert code_of(first) is None
    wait_for(lambda: door.health()["is-unloaded"], "idle time")
    assert not door.service.process.holders
    again = door.send("train", door.train(), door.ticket())
    assert again.content["updates"] == first.content["updates"]


def test_an_absent_service_is_waited_for_a_little(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messenger, "WAIT_SECONDS", 0.3)
    variables = {SOCKET: str(tmp_path / "none"), TICKET: "t"}
    grid = local_grid(make_config(), make_app(partial(carry, variables=variables)))
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([grid.create_message(RecordDict(), "query.join", node, group_id="1")])
    assert code_of(reply) == "site-away"


def test_a_withdrawn_site_sends_its_record_through_the_service(
    open_door: Callable[..., Door], tmp_path: Path
) -> None:
    new_key(tmp_path / "site.key")
    door = open_door(site={"key": str(tmp_path / "site.key")})
    asked = {"query.join": write_question("0" * 32), "train": door.train()}
    assert [code_of(door.send(kind, content, door.ticket())) for kind, content in asked.items()] == [None] * 2
    record = withdraw(load_policy(), "anna", "", tmp_path / "log")
    for kind, content in asked.items():
        reply = door.send(kind, content, door.ticket())
        assert (code_of(reply), refusals.read_withdrawn(reply.content)) == ("withdrawn", record)
    assert code_of(door.send("query.join", asked["query.join"], door.ticket("ben"))) is None
