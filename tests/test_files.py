import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.errors import IntegrityError
from fedllm.files import (
    MANIFEST,
    complete_folder,
    remove_unfinished,
    verify_manifest,
    write_file,
    write_manifest,
    write_once,
)


def build(target: Path, content: str) -> None:
    with complete_folder(target) as building:
        (building / "a.txt").write_text(content)
        (building / "sub").mkdir()
        (building / "sub" / "b.bin").write_bytes(b"\x00\x01" * 50)


def content_of(target: Path) -> str:
    verify_manifest(target)
    return (target / "a.txt").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_with_a_manifest_of_every_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "target"
    with complete_folder(target) as building:
        assert not target.exists()
        (building / "a.txt").write_text("x")
    assert names(target) == ["a.txt", MANIFEST]
    assert names(target.parent) == ["target"]
    assert content_of(target) == "x"


def test_what_is_written_once_stays(tmp_path: Path) -> None:
    file = tmp_path / "once"
    assert write_once(file, b"first") == b"first"
    assert write_once(file, b"second") == b"first" == file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["once"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    build(tmp_path / "target", "old")
    (tmp_path / "target" / "stray").write_text("x")
    build(tmp_path / "target", "new")
    assert content_of(tmp_path / "target") == "new"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_while_building_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with complete_folder(tmp_path / "target") as building:
            (building / "a.txt").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []
    build(tmp_path / "target", "old")
    with pytest.raises(error):
        fail()
    assert content_of(tmp_path / "target") == "old"
    assert names(tmp_path) == ["target"]


def _no_space(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def _second_call_fails(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            _no_space()
        return function(*arguments)

    return call


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "target", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path / "target", "new")
    assert content_of(tmp_path / "target") == "old"
    assert names(tmp_path) == ["target"]


def test_a_folder_that_cannot_take_its_place_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "target", "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _second_call_fails(Path.rename))  # the old is aside, the new not there
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path / "target", "new")
    assert content_of(tmp_path / "target") == "old"
    assert names(tmp_path) == ["target"]


TAMPERINGS: dict[str, Callable[[Path], object]] = {
    "changed": lambda folder: (folder / "a.txt").write_text("y"),
    "same length": lambda folder: (folder / "sub" / "b.bin").write_bytes(b"\x01\x01" * 50),
    "emptied": lambda folder: (folder / "a.txt").write_text(""),
    "missing": lambda folder: (folder / "sub" / "b.bin").unlink(),
    "extra": lambda folder: (folder / "c.txt").write_text(""),
    "extra below": lambda folder: (folder / "sub" / "c.txt").write_text(""),
    "extra hidden": lambda folder: (folder / ".hidden").write_text(""),
    "a second manifest below": lambda folder: (folder / "sub" / MANIFEST).write_text("{}"),
    "renamed": lambda folder: (folder / "a.txt").rename(folder / "b.txt"),
    "moved": lambda folder: (folder / "a.txt").rename(folder / "sub" / "a.txt"),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "other manifest": lambda folder: (folder / MANIFEST).write_text('{"sha256": {}}'),
    "manifest of a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "manifest of a number": lambda folder: (folder / MANIFEST).write_text('{"sha256": 1}'),
    "binary manifest": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_tampering_is_found_and_named_in_one_line(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    build(target, "x")
    verify_manifest(target)
    TAMPERINGS[kind](target)
    with pytest.raises(IntegrityError) as caught:
        verify_manifest(target)
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_of_any_file_goes_unnoticed(data: st.DataObject, tmp_path: Path) -> None:
    target = tmp_path / "target"
    build(target, "some text")
    path = target / data.draw(st.sampled_from(["a.txt", "sub/b.bin"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{path.name}: changed"):
        verify_manifest(target)


def test_a_manifest_can_be_renewed(tmp_path: Path) -> None:
    build(tmp_path / "target", "x")
    (tmp_path / "target" / "a.txt").write_text("y")
    write_manifest(tmp_path / "target")
    assert content_of(tmp_path / "target") == "y"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "file.txt"
    write_file(path, "old\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, _no_space)
        with pytest.raises(OSError, match="No space left"):
            write_file(path, "new\n")
    assert path.read_text() == "old\n"
    assert names(path.parent) == ["file.txt"]
    write_file(path, "ümlaut\n")
    assert path.read_text(encoding="utf-8") == "ümlaut\n"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    build(tmp_path / "adapter", "whole")
    (tmp_path / ".adapter-a_3k2l1m").mkdir()
    (tmp_path / ".adapter-a_3k2l1m" / "weights").write_text("half")
    (tmp_path / ".rounds.jsonl-01234567").write_text("half")
    (tmp_path / ".old-adapter-abcdefgh").mkdir()  # what it replaces is there again
    kept = [".writer.lock", ".starter.lock", ".gitignore"]
    for name in kept:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted([*kept, "adapter"])
    remove_unfinished(tmp_path / "absent")


def test_a_folder_taken_away_for_none_goes_back(tmp_path: Path) -> None:
    build(tmp_path / ".old-adapter-abcdefgh" / "adapter", "old")
    (tmp_path / ".adapter-01234567").mkdir()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["adapter"]
    assert content_of(tmp_path / "adapter") == "old"
