"""Updates that must wait take a bounded share of memory, and the result has the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.exchange.receiving import sort_answers
from strategies.memory import Room
from strategies.rounds import next_round
from tests.builders import client_update

MEGABYTE = 1 << 20


def private_memory() -> int:
    """Return the bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_updates_that_wait_beyond_the_room_are_on_disk(tmp_path: Path) -> None:
    room = Room(10 * MEGABYTE, tmp_path)
    before = private_memory()
    kept = [room.keep(torch.full((MEGABYTE // 4,), float(number))) for number in range(200)]
    assert private_memory() - before < 60 * MEGABYTE
    assert sum(room.sizes.values()) == 10 * MEGABYTE
    assert list(tmp_path.iterdir()) == []  # nothing is left of them, however this process ends
    assert [float(tensor.sum()) for tensor in kept] == [number * MEGABYTE / 4 for number in range(200)]


def test_room_is_given_back_with_its_tensor(tmp_path: Path) -> None:
    room = Room(MEGABYTE, tmp_path)
    tensor = room.keep(torch.ones(MEGABYTE // 4))
    assert room.keep(tensor) is tensor  # one tensor takes its room once
    assert not room.keep(torch.ones(4)).equal(torch.zeros(4))
    del tensor
    assert room.sizes == {}


def test_every_bit_comes_back_from_disk(tmp_path: Path) -> None:
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-45, -3.4e38])
    kept = Room(0, tmp_path).keep(odd)
    assert kept is not odd
    assert kept.view(torch.int32).equal(odd.view(torch.int32))


def test_an_update_on_disk_never_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it writes leaves none behind, and nobody else can open one."""
    found: list[list[Path]] = []
    mapped = torch.from_file

    def look(*args: Any, **numbers: Any) -> torch.Tensor:
        found.append(list(tmp_path.iterdir()))
        return mapped(*args, **numbers)

    monkeypatch.setattr(torch, "from_file", look)
    assert Room(0, tmp_path).keep(torch.ones(3)).equal(torch.ones(3))
    assert found == [[]]


def test_where_no_disk_is_left_updates_stay_in_memory(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    assert Room(0, tmp_path / "absent").keep(tensor) is tensor


def test_updates_wait_for_the_first_of_the_plan_on_disk(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(5)]
    sent = {name: torch.full((8,), float(number)) for number, name in enumerate(names)}
    answers = (client_update(name, sent[name], control_delta=sent[name]) for name in reversed(names))
    got = list(sort_answers(answers, names, Room(0, tmp_path)))
    assert [one.client_id for one in got] == names
    for one in got:
        waited = one.client_id != "c0"
        for vector in (one.delta, one.control_delta):
            assert vector.equal(sent[one.client_id])
            assert (vector is not sent[one.client_id]) == waited


@pytest.mark.parametrize("flat", [{}, {"aggregation.robust": "geometric-median"}])
def test_a_round_on_disk_has_the_bits_of_one_in_memory(
    flat: dict[str, str], make_config: Callable, open_run: Callable, tmp_path: Path, monkeypatch
) -> None:
    inside, outside = open_run(make_config(flat)), open_run(make_config(flat))
    object.__setattr__(outside.session, "room", Room(0, tmp_path))
    pull = outside.grid.pull_messages
    monkeypatch.setattr(outside.grid, "pull_messages", lambda ids: pull(list(ids)[::-1]))  # the last first
    expected, _ = next_round(inside.session, inside.state)
    state, _ = next_round(outside.session, outside.state)
    assert state.adapter.digest == expected.adapter.digest
