"""Temporary folders of Flower's processes."""

import tempfile
from pathlib import Path

import pytest

from scripts.runtimes.processes import temporary_link


def test_folders_of_killed_processes_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, made_just_now, other = (tmp_path / name for name in ("fedllm-flower-a", "fedllm-flower-b", "x"))
    for folder in (killed, made_just_now, other):
        folder.mkdir()
    (killed / ".owner.lock").touch()
    (killed / "superlink.log").touch()
    with temporary_link(is_hardened=False) as first, temporary_link(is_hardened=False) as second:
        living = {first.folder, second.folder}
        assert set(tmp_path.iterdir()) == {made_just_now, other, *living}
    assert set(tmp_path.iterdir()) == {made_just_now, other}
