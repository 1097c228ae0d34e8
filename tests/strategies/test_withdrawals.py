"""A site that withdraws while a run goes on: its record is kept once, and the run goes on without it."""

from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from clients.client_app import app
from fedllm.identity import public_text
from fedllm.runs.folder import read_rounds
from fedllm.wire.refusals import write_withdrawn
from fedllm.withdrawal import read_withdrawal, sign_withdrawal
from scripts.runtimes.local import local_grid
from strategies.run import run_federation
from strategies.session import Watch

KEY = Ed25519PrivateKey.generate()
RECORD = sign_withdrawal(KEY, ["ben"], "2026-11-27T18:00:00+00:00")
BEN = 3  # his node


@pytest.fixture
def run(make_config: Callable, watched_grid: type, tmp_path: Any) -> Callable[..., list[str]]:
    """Return a function (first round of withdrawal, record) that does a run of three rounds -> notices."""

    def do(since: int, record: bytes = RECORD) -> list[str]:
        config = make_config({"run.output": str(tmp_path), "run.name": "left", "federation.num-rounds": 3})
        grid, notices, done = watched_grid(app, local_grid(config, app, num_nodes=4).contexts), [], [0]

        def tamper(reply: Message) -> list[Message]:
            if reply.metadata.src_node_id == BEN and done[0] >= since:
                reply.content = write_withdrawn(record)
            return [reply]

        grid.tamper = tamper
        watch = Watch(notice=notices.append, record=lambda record: done.__setitem__(0, record.round_num + 1))
        run_federation(config, grid, watch)
        return notices

    return do


@pytest.mark.parametrize("since", [0, 2])
def test_a_withdrawal_is_kept_once_and_others_go_on(since: int, run: Callable, tmp_path: Any) -> None:
    notices = run(since)
    (kept,) = (tmp_path / "left" / "withdrawals").iterdir()
    assert kept.read_bytes() == RECORD
    assert read_withdrawal(RECORD).covers(public_text(KEY), "ben")
    assert sum("a site has withdrawn ben" in line for line in notices) == 1
    rounds = [record for record in read_rounds(tmp_path / "left") if record.round_num]
    assert ["ben" in record.accepted for record in rounds] == [since > 1, False, False]
    assert all({"anna", "cleo", "dora"} <= set(record.accepted) for record in rounds)
    asked = [record.round_num for record in rounds if "ben" in record.asked]
    assert asked == ([1, 2] if since else [])  # and never again after it has said so


def test_a_false_withdrawal_is_told_and_not_kept(run: Callable, tmp_path: Any) -> None:
    notices = run(0, RECORD.replace(b"ben", b"dan"))
    assert not (tmp_path / "left" / "withdrawals").exists()
    assert any("a withdrawal that the site's key has not signed; it is not kept" in line for line in notices)
