"""A registry: versions are signed copies, aliases move and come back, and every change is in the log."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from fedllm.adapters.folder import WEIGHTS, save_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.errors import ConfigError, IntegrityError
from fedllm.files import SIGNATURE, locked
from fedllm.identity import public_text
from fedllm.registry.registry import Registry
from fedllm.runs.folder import WITHDRAWALS
from fedllm.runs.lineage import LINEAGE, statement_of_run
from fedllm.signing.statement import read_statement, sign_adapter
from fedllm.withdrawal import sign_withdrawal
from tests.builders import small_layout
from tests.registry.conftest import KEY, PASSED, finished_run

FAILED = {"worst": {"value": 3.0, "limit": 2.0, "passed": False}}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_version_is_the_runs_adapter_signed(registry: Registry, runs: list[Path]) -> None:
    first = registry.version(1)
    files = contents(first.folder)
    del files[SIGNATURE]
    assert files == contents(runs[0] / "adapter")
    said = read_statement(first.folder, [public_text(KEY)])
    assert said == first.statement
    assert (said.name, said.version, said.run["name"], said.gates) == ("clinic", 1, "run0", PASSED)
    assert said.clients == {"number": 1, "commitments": ["0" * 64]}


def test_clients_names_stay_out_of_the_version(registry: Registry) -> None:
    assert list(registry.lineage(1)["consent"]["clients"]) == ["anna"]
    assert not any(b"anna" in content for content in contents(registry.version(1).folder).values())


def test_adding_the_same_again_adds_nothing(registry: Registry, runs: list[Path]) -> None:
    before = contents(registry.folder)
    assert registry.add(runs[0], KEY, PASSED).number == 1
    assert registry.promote(2).aliases == ("production",)
    assert contents(registry.folder) == before


def test_other_gates_make_another_version(registry: Registry, runs: list[Path]) -> None:
    assert registry.add(runs[0], KEY, FAILED).number == 3
    with pytest.raises(ConfigError, match=r"version 3 .* gate worst \(3\.0, limit 2\.0\)"):
        registry.promote(3)
    assert registry.version("production").number == 2


def test_a_rollback_gives_the_same_bytes_back(registry: Registry, runs: list[Path]) -> None:
    before = contents(registry.folder)
    third = registry.add(runs[2], KEY, PASSED)
    registry.promote(third.number)
    assert (registry.folder / "aliases" / "production").read_text() == "0003\n"
    assert registry.rollback().number == 2
    after = contents(registry.folder)
    changing = {"log.jsonl", "head"}
    assert {name: after[name] for name in before.keys() - changing} == {
        name: before[name] for name in before.keys() - changing
    }
    assert registry.rollback().number == 1
    with pytest.raises(ConfigError, match="no other version"):
        registry.rollback()


def test_an_alias_never_points_to_a_changed_version(registry: Registry) -> None:
    (registry.version(1).folder / WEIGHTS).write_bytes(b"other")
    before = contents(registry.folder)
    for move in (registry.rollback, lambda: registry.promote(1, "next")):
        with pytest.raises(IntegrityError, match=rf"0001/{WEIGHTS}: changed"):
            move()
    assert contents(registry.folder) == before | {".registry.lock": b""}


def test_a_marked_version_is_kept_and_never_promoted(registry: Registry, runs: list[Path]) -> None:
    registry.promote(registry.add(runs[2], KEY).number)
    for _ in range(2):  # the second time it is in the log already
        assert registry.mark(2, "a client withdrew").mark == "a client withdrew"
    assert Counter(entry["event"] for entry in registry.entries())["marked"] == 1
    with pytest.raises(ConfigError, match="marked, never promoted: a client withdrew"):
        registry.promote(2, "next")
    assert registry.rollback().number == 1
    registry.verify()


def test_descendants_are_found_over_generations(registry: Registry, tmp_path: Path, runs: list[Path]) -> None:
    child = registry.add(finished_run(tmp_path / "child", 5, start=registry.version(1).folder), KEY)
    grandchild = registry.add(finished_run(tmp_path / "grandchild", 6, start=child.folder), KEY)
    unsigned = registry.add(finished_run(tmp_path / "unsigned", 7, start=runs[1] / "adapter"), KEY)
    found = {number: [each.number for each in registry.descendants(number)] for number in (1, 2, 3, 4)}
    assert found == {
        1: [child.number, grandchild.number],
        2: [unsigned.number],
        3: [grandchild.number],
        4: [],
    }


def test_a_copy_signed_in_its_run_is_the_same_parent(
    registry: Registry, tmp_path: Path, runs: list[Path]
) -> None:
    signed = shutil.copytree(runs[0], tmp_path / "signed")
    sign_adapter(signed / "adapter", statement_of_run(signed), KEY)
    child = registry.add(finished_run(tmp_path / "child", 5, start=signed / "adapter"), KEY)
    assert [each.number for each in registry.descendants(1)] == [child.number]


def test_what_is_made_from_a_marked_version_is_marked(
    registry: Registry, tmp_path: Path, runs: list[Path]
) -> None:
    registry.mark(1, "withdrawn")
    start = registry.version(1).folder
    child = registry.add(finished_run(tmp_path / "child", 5, start=start), KEY)
    grandchild = registry.add(finished_run(tmp_path / "grandchild", 6, start=child.folder), KEY)
    copy = registry.add(runs[0], KEY, FAILED)
    assert [each.mark for each in (child, grandchild, copy)] == ["withdrawn"] * 3
    with pytest.raises(ConfigError, match="marked, never promoted: withdrawn"):
        registry.promote(child.number)
    unlearnt = finished_run(tmp_path / "unlearnt", 7)
    parent = {"parent": registry.version(1).weights}
    for kind, mark in (("D", "withdrawn"), ("A", "")):
        (unlearnt / "unlearning.json").write_text(json.dumps({"class": kind, **parent}))
        assert registry.add(unlearnt, KEY).mark == mark


def test_a_run_that_a_withdrawal_has_reached_is_marked(registry: Registry, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", 5)
    lineage = json.loads((run / LINEAGE).read_text())
    lineage["consent"]["clients"]["anna"]["site"] = public_text(KEY)
    (run / LINEAGE).write_text(json.dumps(lineage))
    (run / WITHDRAWALS).mkdir()
    record = sign_withdrawal(KEY, ["anna"], "2026-11-27T18:00:00+00:00")
    (run / WITHDRAWALS / "1.json").write_bytes(record)
    version = registry.add(run, KEY)
    assert "withdrawn" in version.mark
    assert "anna" not in version.mark


def test_what_changes_while_it_is_copied_is_not_signed(
    registry: Registry, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree = shutil.copytree

    def changing(source: Path, target: Path, **options: object) -> Path:
        copytree(source, target, **options)  # type: ignore[arg-type]
        (target / "README.md").write_text("# Another card\n")
        return target

    monkeypatch.setattr(shutil, "copytree", changing)
    with pytest.raises(IntegrityError, match=r"adapter/README\.md: changed"):
        registry.add(runs[2], KEY)
    assert len(registry.versions()) == 2
    registry.verify()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, runs: list[Path]) -> None:
    photo = tmp_path / "photos" / "0001" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    photo.touch()
    with pytest.raises(ConfigError, match="0001: not made by this registry"):
        Registry(photo.parent.parent).add(runs[0], KEY)
    assert photo.exists()


def test_lineage_that_was_changed_is_not_read(registry: Registry) -> None:
    file = registry.folder / "lineage" / "0001.json"
    for change in (lambda: file.write_text("{}"), file.unlink):
        change()
        with pytest.raises(IntegrityError, match=r"0001\.json: not the lineage"):
            registry.lineage(1)


def test_notes_of_others_are_lines_of_the_log(registry: Registry) -> None:
    registry.note("drift", client="anna", rounds=3)
    last = list(registry.entries())[-1]
    assert (last["event"], last["client"], last["rounds"]) == ("drift", "anna", 3)
    with pytest.raises(ValueError, match="the registry itself"):
        registry.note("promoted", version=1, alias="production")
    assert registry.verify().num_lines == 5


def test_two_processes_never_change_it_at_once(registry: Registry, runs: list[Path]) -> None:
    with locked(registry.folder / ".registry.lock"), pytest.raises(ConfigError, match="another process"):
        registry.add(runs[2], KEY)
    assert registry.add(runs[2], KEY).number == 3


def test_what_is_not_there_is_one_line(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no version '7'; there are: 1 to 2, production"):
        registry.promote(7)
    with pytest.raises(ConfigError, match="no version 'next'"):
        registry.rollback("next")
    with pytest.raises(ConfigError, match=r"alias '\.\./x'"):
        registry.promote(1, "../x")
    with pytest.raises(IntegrityError, match="not an adapter folder"):
        registry.add(tmp_path / "nothing", KEY)
    assert Registry(tmp_path / "empty").versions() == ()


def test_private_and_unfinished_adapters_get_no_version(registry: Registry, tmp_path: Path) -> None:
    names = {"base_model": "org/base", "revision": "", "target_modules": ["a"], "card": ""}
    adapter = initial_adapter(small_layout(), 0)
    save_adapter(tmp_path / "anna", adapter, is_public=False, **names)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is private"):
        registry.add(tmp_path / "anna", KEY)
    run = finished_run(tmp_path / "stopped", 0)
    (run / "result.json").write_text(json.dumps({"status": "failed"}))
    with pytest.raises(ConfigError, match="not a finished run"):
        registry.add(run, KEY)
    (run / "result.json").write_text(json.dumps({"status": "completed"}))
    (run / LINEAGE).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        registry.add(run, KEY)
    assert len(registry.versions()) == 2
