"""Kills at every write of a change: the registry verifies, and going on gives the same bytes."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedllm.registry.registry import Registry
from tests.registry.conftest import KEY, PASSED

# Events of Python's audit hooks that change what is on disk; "open" counts where it may write.
CHANGING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod"}


def is_write(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    """Return whether an event is a write to something in `folder`."""
    if not any(str(folder) in os.fsdecode(each) for each in arguments if isinstance(each, str | bytes)):
        return False
    return event in CHANGING or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))


def killed_at(step: int, folder: Path, work: Callable[[], object]) -> bool:
    """Do `work` in a process that SIGKILL ends before its write number `step`; False if it has fewer."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work itself failed"
        return os.WIFSIGNALED(status)
    writes = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal writes
        if event in CHANGING | {"open"} and is_write(event, arguments, folder):
            writes += 1
            if writes == step:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def state_of(registry: Registry) -> dict[str, object]:
    """Return all that a registry holds but times: every file's bytes, and the entries of the log."""
    apart = {"log.jsonl", "head", ".registry.lock"}
    files = [file for file in registry.folder.rglob("*") if file.is_file() and file.name not in apart]
    state: dict[str, object] = {str(file.relative_to(registry.folder)): file.read_bytes() for file in files}
    log = [json.loads(line) for line in (registry.folder / "log.jsonl").read_text().splitlines()]
    return state | {"log": [{**entry, "time": "", "previous": ""} for entry in log]}


def copies(registry: Registry) -> Iterator[tuple[int, Registry]]:
    """Yield a fresh copy of a registry for each step, under the same name."""
    for step in range(1, 1000):
        folder = registry.folder.parent / f"step{step}" / registry.name
        shutil.copytree(registry.folder, folder)
        yield step, Registry(folder)
        shutil.rmtree(folder.parent)


def roll_back_once(registry: Registry) -> None:
    """Roll back to version 1; where the log has that already, promoting 1 mends the alias."""
    if registry.version("production").number == 1:
        registry.promote(1)
    else:
        registry.rollback()


def works_of(run: Path) -> dict[str, Callable[[Registry], object]]:
    """Return the changes of a registry, each of which may be asked for again."""
    return {
        "add": lambda registry: registry.add(run, KEY, PASSED),
        "promote": lambda registry: registry.promote(1),
        "rollback": roll_back_once,
        "mark": lambda registry: registry.mark(1, "withdrawn"),
        "add and promote": lambda registry: registry.promote(registry.add(run, KEY, PASSED).number),
    }


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the child computes nothing with threads
@pytest.mark.parametrize(
    ("change", "least"),
    [
        ("add", 20),
        ("promote", 8),
        pytest.param("rollback", 8, marks=pytest.mark.soak),
        pytest.param("mark", 5, marks=pytest.mark.soak),
    ],
)
def test_a_kill_at_any_write_changes_nothing_or_all(
    change: str, least: int, registry: Registry, runs: list[Path]
) -> None:
    work = works_of(runs[2])[change]
    whole = Registry(registry.folder.parent / "whole" / registry.name)
    shutil.copytree(registry.folder, whole.folder)
    work(whole)
    for step, copy in copies(registry):
        is_killed = killed_at(step, copy.folder, lambda copy=copy: work(copy))
        copy.verify()
        if is_killed:
            work(copy)
        assert not copy.verify().unfinished
        assert state_of(copy) == state_of(whole), f"killed at write {step}"
        if not is_killed:
            break
    assert step > least


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_kills_in_a_row_cost_nothing_either(registry: Registry, runs: list[Path]) -> None:
    work = works_of(runs[2])["add and promote"]
    whole = Registry(registry.folder.parent / "whole" / registry.name)
    shutil.copytree(registry.folder, whole.folder)
    work(whole)
    num_pairs = 0
    for step, once in copies(registry):
        if not killed_at(step, once.folder, lambda once=once: work(once)):
            break
        for again, twice in copies(once):
            is_killed = killed_at(again, twice.folder, lambda twice=twice: work(twice))
            twice.verify()
            work(twice)
            assert state_of(twice) == state_of(whole), f"killed at writes {step} and {again}"
            num_pairs += 1
            if not is_killed:
                break
    print(num_pairs, "pairs of kills")
    assert num_pairs > 400


def test_an_unfinished_version_is_no_version(registry: Registry, runs: list[Path]) -> None:
    left = registry.folder / "0003"
    shutil.copytree(registry.version(2).folder, left)
    assert registry.verify().unfinished == ("0003",)
    assert [version.number for version in registry.versions()] == [1, 2]
    assert registry.add(runs[2], KEY, PASSED).statement.run["name"] == "run2"
    registry.verify()
