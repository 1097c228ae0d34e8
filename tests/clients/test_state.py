"""What a client keeps for itself comes back bit for bit, or not at all."""

import logging
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from clients.site import state_path_of
from clients.state import NUM_KEPT, PrivateStore, load_private, save_private
from fedllm.errors import CheckpointError

SIZES = {"personal": 6, "control": 3}


def vectors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


@pytest.fixture
def store(tmp_path: Path) -> PrivateStore:
    return PrivateStore(tmp_path / "run", "d" * 64)


def states(store: PrivateStore, client_id: str = "anna") -> list[int]:
    return sorted(int(file.stem.partition("-")[2]) for file in (store.folder / client_id).iterdir())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_vectors_come_back_for_their_client_and_state_only(store: PrivateStore) -> None:
    save_private(store, "anna", 8, vectors(0))
    save_private(store, "ben", 8, vectors(1))
    save_private(store, "anna", 16, vectors(2))
    assert_same(load_private(store, "anna", 8, SIZES), vectors(0))
    assert_same(load_private(store, "anna", 16, SIZES), vectors(2))
    assert_same(load_private(store, "ben", 8, SIZES), vectors(1))


def test_client_has_nothing_before_its_first_round(
    store: PrivateStore, caplog: pytest.LogCaptureFixture
) -> None:
    save_private(store, "anna", 8, vectors(0))
    assert load_private(store, "anna", 0, SIZES) == {}
    assert caplog.text == ""


@settings(deadline=None, max_examples=30)
@given(drawn=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_newest_states_stay_and_later_ones_go(
    drawn: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = PrivateStore(tmp_path_factory.mktemp("state"), "d" * 64)
    alive: list[int] = []
    for number in drawn:
        save_private(store, "anna", number, vectors(number))
        alive = sorted({*(n for n in alive if n < number), number})[-NUM_KEPT:]
        assert states(store) == alive
        assert_same(load_private(store, "anna", number, SIZES), vectors(number))


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "removed", "replaced", "unsigned", "folder"])
def test_damaged_state_is_one_line_and_a_fresh_start(
    damage: str, store: PrivateStore, caplog: pytest.LogCaptureFixture
) -> None:
    save_private(store, "anna", 8, vectors(0))
    (file,) = (store.folder / "anna").iterdir()
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "removed":
        unsigned = save({name: torch.zeros(size) for name, size in SIZES.items()}, {"fedllm": "[]"})
        forms = {
            "unsigned": unsigned,
            "cut": content[:40],
            "flipped": content,
            "emptied": b"",
            "replaced": b"\x80\x04N.",
        }
        file.write_bytes(bytes(forms[damage]))
    with caplog.at_level(logging.WARNING):
        assert load_private(store, "anna", 8, SIZES) == {}
    (line,) = caplog.messages
    assert line.startswith("client anna: ")
    assert line.endswith("starts afresh")
    assert "\n" not in line


def test_state_of_another_layout_or_vectors_is_not_taken(
    store: PrivateStore, caplog: pytest.LogCaptureFixture
) -> None:
    save_private(store, "anna", 8, vectors(0))
    other = PrivateStore(store.folder, "e" * 64)
    assert load_private(other, "anna", 8, SIZES) == {}
    assert load_private(store, "anna", 8, {**SIZES, "third": 1}) == {}
    assert load_private(store, "anna", 8, {**SIZES, "control": 4}) == {}
    found = load_private(store, "anna", 8, {"personal": 6})["personal"]
    assert torch.equal(found, vectors(0)["personal"])
    assert "another adapter layout" in caplog.messages[0]
    assert "other vectors than this run keeps" in caplog.messages[1]


def test_nobody_else_on_the_machine_reads_it(store: PrivateStore) -> None:
    save_private(store, "anna", 8, vectors(0))
    (file,) = (store.folder / "anna").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) & 0o077 == 0


def test_unwritable_folder_is_one_line_and_old_states_stay(store: PrivateStore) -> None:
    save_private(store, "anna", 8, vectors(0))
    (store.folder / "ben").write_text("in the way")
    with pytest.raises(CheckpointError, match="client ben: private state cannot be written") as caught:
        save_private(store, "ben", 8, vectors(1))
    assert "\n" not in str(caught.value)
    assert_same(load_private(store, "anna", 8, SIZES), vectors(0))


def test_the_default_is_the_users_folder_for_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_path_of({}) == tmp_path / "fedllm"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_path_of({}) == tmp_path / ".local" / "state" / "fedllm"
