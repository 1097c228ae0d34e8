"""Canaries that a data holder plants: off by default, its own secret, the same after a restart."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from clients.canaries import canary_file
from clients.data_holder import DataHolder
from clients.process import Process
from fedllm.config.run_config import RunConfig


def opened(config: RunConfig, state: Path) -> DataHolder:
    return Process().open(config.to_flat(), {"server-paths": True, "state-path": str(state)})


def test_none_are_planted_unless_asked_for(
    make_config: Callable, write_rows: Callable, tmp_path: Path
) -> None:
    config = make_config(write_rows("rows.jsonl", {"anna": 4, "ben": 3}))
    opened(config, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_canaries_are_drawn_by_coins_of_a_kept_secret(
    make_config: Callable, write_rows: Callable, tmp_path: Path
) -> None:
    source = write_rows("rows.jsonl", {"anna": 4, "ben": 3})
    plain = opened(make_config(source), tmp_path / "plain")
    config = make_config(source, **{"audit.canaries": "30:1,3"})
    planted = opened(config, tmp_path / "state")
    file = canary_file(tmp_path / "state", config.run.name)
    assert file.stat().st_mode & 0o777 == 0o600
    for name, client in planted.clients.items():
        own = plain.clients[name]
        assert client.train[: len(own.train)] == own.train
        assert client.held_out == own.held_out
        extra = Counter(row.tokens for row in client.train[len(own.train) :])
        assert {len(tokens) for tokens in extra} == {16}
        assert set(extra.values()) == {1, 3}
        assert 3 < len(extra) < 27  # thirty fair coins: outside less than once in 100,000
    again = opened(config, tmp_path / "state")
    assert {name: client.digest for name, client in again.clients.items()} == {
        name: client.digest for name, client in planted.clients.items()
    }
    elsewhere = opened(config, tmp_path / "other")
    assert elsewhere.clients["anna"].digest != planted.clients["anna"].digest


def test_a_client_without_rows_gets_none(make_config: Callable, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    config = make_config(**{"audit.canaries": 30})
    node = {"data-path": str(empty), "client-id": "anna", "server-paths": True, "state-path": str(tmp_path)}
    assert Process().open(config.to_flat(), node).clients["anna"].train == ()
