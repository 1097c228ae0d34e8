"""What a client keeps of the adapters of a run whose server has none."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clients.own_adapter import keep_own_adapter, own_adapter
from clients.process import Process
from fedllm.errors import NotHeldError


def test_a_run_that_begins_anew_keeps_its_first_rounds(
    write_rows: Callable, make_config: Callable, tmp_path: Path
) -> None:
    """A server that lost its checkpoints starts at round 1, and clients still hold later adapters."""
    names = ("anna", "ben", "cleo")
    flat = {"secure.method": "shares", "federation.num-clients": 3}
    config = make_config(write_rows("rows.jsonl", dict.fromkeys(names, 6)), **flat)
    node = {"server-paths": True, "state-path": str(tmp_path / "state")}
    holder = Process().open(config.to_flat(), node)
    for round_num in (1, 2, 3, 4, 5, 1):
        keep_own_adapter(holder, "anna", round_num, holder.initial)
    assert own_adapter(holder, "anna", 1).digest == holder.initial.digest
    with pytest.raises(NotHeldError, match="no adapter of round 5"):
        own_adapter(holder, "anna", 5)
