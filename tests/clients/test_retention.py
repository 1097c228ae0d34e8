"""What a site removes of ended runs, and what it must keep whatever its owner says."""

import asyncio
import os
from pathlib import Path

import pytest

from clients.asked import SECONDS_A_DAY
from clients.process import Process
from clients.retention import remove_ended
from clients.service import Service
from clients.tickets import Tickets

OLD, NEW = f"old-1-{'0a' * 8}", f"new-1-{'0b' * 8}"
SECURE = f"secure/old-2-{'0c' * 8}"
NOW = 1_700_000_000.0  # long ago, by any clock
VECTORS = (f"{OLD}/anna/drawn-000000000008.safetensors", f"{OLD}/anna/home/adapter_model.safetensors")
KEYS = (
    f"{SECURE}/anna/key",
    f"{SECURE}/anna/secret",
    f"{SECURE}/anna/encryption",
    f"{SECURE}/anna/round-000002.safetensors",
)
KEPT = (
    f"{OLD}/noise-secret",
    f"{OLD}/anna/privacy-ledger.json",
    f"{OLD}/anna/rows-0123",
    f"{SECURE}/anna/ab.masked",
    f"{NEW}/anna/drawn-000000000008.safetensors",
    "models/small/model.safetensors",
    "split-secret",
    "withdrawn.json",
    "log.jsonl",
    "logs/service.log",
    "asked/ward.json",
    "budget/ward/ledger.json",
)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder of ended runs, 31 days old, and of one whose last change was a day ago."""
    for name in (*VECTORS, *KEYS, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for path in (tmp_path, *tmp_path.rglob("*")):
        days = 1 if NEW in path.parts else 31
        os.utime(path, (NOW - days * SECONDS_A_DAY,) * 2)
    return tmp_path


def test_vectors_and_keys_of_ended_runs_go_and_all_else_stays(state: Path) -> None:
    assert remove_ended(state, 30, NOW) == [OLD, SECURE]
    assert not any((state / name).exists() for name in (*VECTORS, *KEYS, f"{OLD}/anna/home"))
    assert [(state / name).read_text() for name in KEPT] == list(KEPT)
    assert remove_ended(state, 30, NOW + SECONDS_A_DAY) == []


def test_a_run_that_was_asked_lately_keeps_all(state: Path) -> None:
    os.utime(state / f"{OLD}/anna/privacy-ledger.json", (NOW,) * 2)
    assert remove_ended(state, 30, NOW) == [SECURE]
    assert all((state / name).exists() for name in VECTORS)
    assert remove_ended(state / "absent", 30, NOW) == []


def test_the_service_removes_what_its_owner_keeps_no_longer(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (state / "site.toml").write_text('[site]\nstate-path = "."\nkeep-days = 30\n')
    monkeypatch.setenv("FEDLLM_SITE", str(state / "site.toml"))
    os.utime(state / f"{NEW}/anna/drawn-000000000008.safetensors")  # now, by this machine's clock

    async def look() -> None:
        removing = asyncio.create_task(Service(Process(), Tickets({})).remove_ended())
        while any((state / name).exists() for name in (*VECTORS, *KEYS)):
            await asyncio.sleep(0.01)
        removing.cancel()

    asyncio.run(asyncio.wait_for(look(), 300))
    assert [(state / name).exists() for name in KEPT] == [True] * len(KEPT)
