"""A site that withdraws never answers again, in a real deployment: SuperLink, service, nodes, restarts."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedllm.chained_log import read_entries
from fedllm.identity import new_key, public_text
from fedllm.runs.folder import WITHDRAWALS
from fedllm.withdrawal import read_withdrawal
from scripts.recipe_arguments import config_of
from scripts.runtimes.processes import Link, superlink, temporary_link
from scripts.runtimes.submitting import submit
from tests.site_builder import ROOT, started_site, wait_for, write_site

pytestmark = pytest.mark.soak


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a short name: the system limits a socket's path."""
    made = Path(tempfile.mkdtemp(prefix="left-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def link() -> Iterator[Link]:
    """A running SuperLink."""
    with temporary_link(is_hardened=False) as made, superlink(made):
        yield made


@pytest.fixture
def do(folder: Path, link: Link, make_model_folder: Callable[..., Path]) -> Callable[[str], dict[str, Any]]:
    """Return a function (name of a run) that does it -> what it says of its end."""
    words = ["quickstart.toml", f"model.name={make_model_folder()}", "federation.num-clients=2"]
    words += ["federation.num-rounds=1", "federation.join-deadline=600", "model.device=cpu", "lora.rank=2"]
    words += ["train.local-steps=2", "evaluation.prompts=", "distill.when=never"]
    config = config_of([*words, f"run.output={folder / 'runs'}"])

    def run(name: str) -> dict[str, Any]:
        submit(link, config.override({"run.name": name}), {})
        result = folder / "runs" / name / "result.json"
        wait_for(result.exists, "the run's end", patience=1200)  # four runs, also on a busy machine
        found: dict[str, Any] = json.loads(result.read_text())
        print(name, found["status"], found.get("reason", ""))  # shown where the story ends badly
        return found

    return run


def withdraw(file: Path, *words: str) -> bytes:
    """Do what the owner of a site does, and return the record that was written for servers."""
    out = file.parent / "withdrawal.json"
    command = [sys.executable, "-m", "fedllm", "site", "withdraw", *words, "--config", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--out", str(out)], check=True, env=environment, cwd=file.parent)
    return out.read_bytes()


def clients_of(folder: Path, name: str) -> set[str]:
    """Return the clients whose updates a run has taken."""
    log = folder / "runs" / name / "decisions.jsonl"
    return {entry["client"] for entry in read_entries(log) if entry["event"] == "accepted"}


def test_a_withdrawn_site_never_answers_again(
    folder: Path, link: Link, do: Callable, make_model_folder: Callable[..., Path]
) -> None:
    public = public_text(new_key(folder / "site.key"))
    own = {"model-path": str(make_model_folder()), "server-paths": False}
    file = write_site(
        folder, link.address, dict.fromkeys(("anna", "ben"), own), site={"key": str(folder / "site.key")}
    )
    with started_site(file):
        assert do("both")["status"] == "completed"
        assert clients_of(folder, "both") == {"anna", "ben"}
        record = withdraw(file, "ben", "--reason", "asked to")
        assert do("without-ben")["status"] == "completed"
        assert clients_of(folder, "without-ben") == {"anna"}
    kept = [path.read_bytes() for path in (folder / "runs" / "without-ben" / WITHDRAWALS).iterdir()]
    assert kept == [record]
    assert (read_withdrawal(record).site, read_withdrawal(record).clients) == (public, ("ben",))
    with started_site(file):  # as after any restart
        assert do("still-without")["status"] == "completed"
        assert clients_of(folder, "still-without") == {"anna"}
        withdraw(file)
        ended = do("nobody")
    assert (ended["status"], "withdrawn" in ended["reason"]) == ("failed", True)
    entries = list(read_entries(folder / "state" / "log.jsonl"))
    (since,) = (place for place, entry in enumerate(entries) if entry.get("reason") == "asked to")
    answered = [entry for entry in entries[since + 1 :] if entry.get("node") == "ben" and "code" in entry]
    assert answered
    assert {entry["code"] for entry in answered} == {"withdrawn"}
