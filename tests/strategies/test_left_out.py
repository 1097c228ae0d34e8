"""Clients that a run goes on without: neither waited for nor taken, also when they come back."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from fedllm.runs.folder import LEFT_OUT, read_left_out, write_left_out
from strategies.exchange.joining import rejoin


def test_a_client_left_out_takes_no_part_and_others_are_not_waited_for(
    open_run: Callable, make_config: Callable, tmp_path: Path
) -> None:
    write_left_out(tmp_path / "run", ["dora", "ben"])
    run = open_run(make_config({"run.output": str(tmp_path)}), folder=tmp_path / "run")
    assert list(run.session.clients) == ["anna", "cleo"]
    assert "client ben, dora: the run goes on without it" in " ".join(run.notices)
    assert not any("expected clients joined" in line for line in run.notices)
    rejoin(run.session)
    assert list(run.session.clients) == ["anna", "cleo"]


def test_a_damaged_list_of_clients_left_out_stops_the_run(tmp_path: Path) -> None:
    assert read_left_out(tmp_path) == frozenset()
    for content in ("[1", "3", "null"):
        (tmp_path / LEFT_OUT).write_text(content)
        with pytest.raises(ConfigError, match=r"left-out\.json: no list of clients"):
            read_left_out(tmp_path)
