"""`fedllm registry`: what a person types, and the line or table that comes back."""

import json
from pathlib import Path

import pytest

from fedllm.files import SIGNATURE
from fedllm.identity import new_key, public_text
from scripts.cli import app
from scripts.command_line import run_app
from tests.registry.conftest import finished_run


def typed(*words: object) -> int:
    return run_app(app, ["registry", *map(str, words)], name="fedllm")


@pytest.fixture
def clinic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A registry of two versions, the second made from the first; the first is production."""
    key, folder = tmp_path / "signing.key", tmp_path / "clinic"
    new_key(key)
    assert typed("add", folder, finished_run(tmp_path / "first", 1), "--key", key) == 0
    second = finished_run(tmp_path / "second", 2, start=folder / "0001")
    assert typed("add", folder, second, "--key", key) == 0
    assert typed("promote", folder, 1) == 0
    assert "version 1 is production" in capsys.readouterr().out
    return folder


def test_list_has_a_line_for_each_version(clinic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("list", clinic) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[:4] == ["1", "production", "first", "1"]
    *_, epsilon, gates, parent = second.split()
    assert (epsilon, gates, parent) == ("none", "none", "1"), "made from version 1"
    assert typed("list", clinic, "--json") == 0
    assert [each["number"] for each in json.loads(capsys.readouterr().out)] == [1, 2]


def test_show_tells_how_a_version_came_about(clinic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("show", clinic, 2) == 0
    shown = capsys.readouterr().out
    for words in (
        "retrained-from",
        "name second",
        "commitments 1",
        "purpose letters",
        "epsilon       no guarantee",
    ):
        assert words in shown
    assert typed("show", clinic, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["number"], found["descendants"]) == (1, [2])
    assert found["statement"]["app"]["source"] == "ef" * 32


def test_promote_rollback_and_mark_follow_each_other(
    clinic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("promote", clinic, 2) == 0
    assert typed("mark", clinic, 1, "--reason", "withdrawn", "--descendants") == 0
    told = capsys.readouterr().out
    assert "version 1 is marked" in told
    assert "production still points to it; `fedllm registry rollback --alias production`" in told
    assert typed("rollback", clinic) == 2  # the version before is marked too
    assert "no other version that may be used" in capsys.readouterr().err
    assert typed("promote", clinic, "production", "--alias", "next") == 2
    assert "marked, never promoted: withdrawn" in capsys.readouterr().err


def test_verify_names_what_was_changed_with_code_1(clinic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = json.loads((clinic / "0001" / SIGNATURE).read_text())["signatures"][0]["keyid"]
    assert typed("verify", clinic, "--key", public, "--json") == 0
    head = json.loads(capsys.readouterr().out)["head"]
    assert typed("verify", clinic, "--head", head) == 0
    assert "2 versions, 3 lines of log, none changed" in capsys.readouterr().out
    other = public_text(new_key(clinic.parent / "other.key"))
    assert typed("verify", clinic, "--key", other) == 1
    (clinic / "0002" / "README.md").write_text("other")
    assert typed("verify", clinic, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["intact"] is False
    assert "0002/README.md: changed" in told["reason"]


def test_where_there_is_no_registry_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["list"], ["show"], ["promote"], ["rollback"], ["verify"]):
        more = ["1"] if words == ["promote"] else []
        assert typed(*words, tmp_path / "none", *more) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no registry; `fedllm registry add` makes one" in line
    assert not (tmp_path / "none").exists()
