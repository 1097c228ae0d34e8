"""Canaries and their coins stay on the machine that drew them."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.common.serde import message_to_proto

from clients.client_app import app
from clients.process import PROCESS, Process
from fedllm.attacks.canaries import Canary
from fedllm.config.run_config import RunConfig
from fedllm.models.base import load_tokenizer
from fedllm.plan.run_plan import resolve
from scripts.auditing.opening import open_case
from scripts.runtimes.local import LocalGrid, local_grid
from strategies.run import run_federation

OVERRIDES = {"audit.canaries": "12:1,4"}


class Recorded(LocalGrid):
    """A local grid that keeps the bytes of every message in both directions."""

    seen: list[bytes]

    def push_messages(self, messages) -> Iterator[str]:
        messages = list(messages)
        self.seen += [message_to_proto(message).SerializeToString() for message in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids) -> list[Message]:
        replies = list(super().pull_messages(message_ids))
        self.seen += [message_to_proto(reply).SerializeToString() for reply in replies]
        return replies


def forms_of(canary: Canary, tokenizer) -> list[bytes]:
    tokens = canary.tokens
    found = [np.array(tokens, dtype).tobytes() for dtype in ("<i4", "<i8", "<u2", "<f4")]
    found += [", ".join(map(str, tokens)).encode(), ",".join(map(str, tokens)).encode()]
    return [*found, tokenizer.decode(list(tokens)).encode()]


def test_neither_canaries_nor_coins_leave(finished: Callable, tmp_path: Path) -> None:
    folder = finished("planted", OVERRIDES)
    case = open_case(folder, max_rows=10, scratch=tmp_path / "state")
    secret_file = next((folder / "private").glob("*-canary-secret"))
    secret = secret_file.read_bytes()
    private = [secret, secret.hex().encode(), base64.b64encode(secret)[:-1]]
    tokenizer = load_tokenizer(case.holder.files)
    for canary in case.canaries:
        private += forms_of(canary, tokenizer)
    assert len(private) == 3 + 7 * 24

    config = case.config.override({"run.name": "again", "run.output": str(tmp_path)})
    plain = local_grid(config, app)
    grid = Recorded(app, plain.contexts)
    grid.seen = []
    (tmp_path / "again" / "private").mkdir(parents=True)
    (tmp_path / "again" / "private" / "again-canary-secret").write_bytes(secret)  # the same canaries
    run_federation(config, grid)
    (context,) = plain.contexts.values()
    holder = PROCESS.open(context.run_config, context.node_config)
    rows = {row.tokens for client in holder.clients.values() for row in client.train}
    assert rows >= {canary.tokens for canary in case.canaries if canary.included}  # they were trained on
    published = [path for path in folder.rglob("*") if path.is_file() and path != secret_file]
    published += [
        path for path in (tmp_path / "again").rglob("*") if path.is_file() and "private" not in path.parts
    ]
    for content in [*grid.seen, *(path.read_bytes() for path in published)]:
        assert not [form for form in private if form in content]
    assert len(grid.seen) > 6


def test_the_search_finds_what_it_is_meant_to_find(finished: Callable, tmp_path: Path) -> None:
    case = open_case(finished("planted", OVERRIDES), max_rows=10, scratch=tmp_path)
    tokenizer = load_tokenizer(case.holder.files)
    canary = case.canaries[0]
    assert all(form in b"x" + form + b"y" for form in forms_of(canary, tokenizer))
    assert str(list(canary.tokens)).encode()[1:-1] in forms_of(canary, tokenizer)


def test_what_a_client_declares_counts_the_canaries_that_are_in(finished: Callable, tmp_path: Path) -> None:
    folder = finished("planted", OVERRIDES)
    case = open_case(folder, max_rows=10, scratch=tmp_path)
    node = {"server-paths": True, "state-path": str(folder / "private")}
    planted = Process().open(case.config.to_flat(), node)
    for name, client in case.holder.clients.items():
        rows = sum(one.repeats for one in case.canaries if one.client_id == name and one.included)
        assert len(planted.clients[name].train) == len(client.train) + rows
        assert planted.clients[name].train[: len(client.train)] == client.train
        assert planted.clients[name].held_out == client.held_out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"audit.canaries": 1, "train.max-length": 15}, "train.max-length = 15"),
        ({"audit.canaries": "9:1,x"}, "expected a whole number up to"),
        ({"audit.canaries": "9:0"}, "expected a whole number up to"),
    ],
)
def test_canaries_that_cannot_be(overrides: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve(RunConfig.from_flat({"train.max-length": 64, **overrides}))
