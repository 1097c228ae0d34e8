"""Kills of the processes of a federation: its run completes, with the bits of one that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from scripts.deploying.certificates import new_credentials, new_node_key
from scripts.recipe_arguments import config_of
from scripts.runtimes.local import init, step
from scripts.runtimes.processes import Link, free_port, register, superlink
from tests.site_builder import started_site, write_site
from tests.stories.conftest import DISTILLED, FEDLLM, processes_of, result_of, rounds_of, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc"),
]
# What is killed, by a word at the end of one of the first words of its command line.
AT_SERVER = ["flwr-serverapp", "flower-superlink", "flower-superexec"] * 4 + ["serve"] * 3
AT_SITES = ["clients.service", "clients.launcher", "supernode"] * 5
AT_BOTH = ["flwr-serverapp"] * 9 + ["flower-superlink"] * 2 + AT_SITES[:9]
LONGEST_RUN = 3600.0  # seconds


@pytest.mark.soak
def test_a_killed_serverapp_costs_no_bit(tiny_run: list[str], tmp_path: Path) -> None:
    words = [*tiny_run, *DISTILLED, "federation.num-clients=2", f"run.output={tmp_path}"]
    words += ["personal.mode=finetune", "data.held-out-fraction=0.3"]
    config = config_of(words)
    undisturbed = init(config, num_nodes=2)
    for _ in range(config.federation.num_rounds):
        undisturbed, _ = step(undisturbed)
    folder = tmp_path / "killed"
    command = [FEDLLM, "run", *words, "run.name=killed", "--runtime", "deployment"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment_of(folder), stdout=subprocess.PIPE, text=True
    ) as run:
        wait_until(lambda: 1 in rounds_of(folder) or run.poll() is not None)
        kill(folder, "flwr-serverapp")
        told, _ = run.communicate()
    assert run.returncode == 0, told
    assert "the ServerApp died; starting again, 1 rounds are complete" in told
    assert result_of(folder)["digest"] == undisturbed.adapter.digest
    assert rounds_of(folder) == [0, 1, 2]
    last = lines_of(folder / "rounds.jsonl")[-1]
    assert last["distillation"]["texts"], "texts were written and asked about"
    assert len(last["at_home"]["home"]) == 2, "clients trained on at home"
    wait_until(lambda: not processes_of(folder))


@dataclass(frozen=True)
class Kill:
    """A killed program, the round it was killed in, and after how many seconds a round was complete."""

    program: str
    round_num: int
    seconds: float = 0.0


@dataclass(eq=False)
class Federation:
    """Sites, each with a service and a SuperNode of its own, that wait for servers on one port."""

    folder: Path
    link: Link
    words: list[str]
    codes: list[int] = field(default_factory=list)  # of each `fedllm serve` that has ended

    @contextmanager
    def served(self, name: str) -> Iterator[Path]:
        """Serve a run until it has ended, as systemd would: whoever is killed is started again.

        Yield the folder of the run.
        """
        assert self.link.credentials
        command = [sys.executable, "-m", "fedllm", "serve", *self.words, f"run.name={name}", "--log", "json"]
        command += [
            "--credentials",
            str(self.link.credentials.folder),
            "--state",
            str(self.folder / "server"),
        ]
        command += ["--port", str(self.link.port), "--out", str(self.folder), "--max-restarts", "30"]
        self.codes.clear()
        thread = threading.Thread(target=self._serve, args=[command])
        thread.start()
        try:
            yield self.folder / name
        finally:
            thread.join(LONGEST_RUN)
        assert self.codes[-1:] == [0], (self.folder / "serve.log").read_text()[-2000:]

    def _serve(self, command: Sequence[str]) -> None:
        while not self.codes or self.codes[-1] < 0:
            with (self.folder / "serve.log").open("ab") as log:
                done = subprocess.run(
                    command,
                    cwd=self.folder,
                    env=environment_of(self.folder),
                    stdout=log,
                    stderr=log,
                    timeout=LONGEST_RUN,
                    check=False,
                )
            self.codes.append(done.returncode)


@contextmanager
def federation(folder: Path, words: Sequence[str], num_sites: int = 2) -> Iterator[Federation]:
    """Run sites whose keys a server admits, for the length of the block; nothing is left of them then."""
    credentials = new_credentials(folder / "credentials", [])
    (folder / "server").mkdir()
    link = Link(folder / "server", free_port(), credentials)
    found = Federation(folder, link, [*words, f"federation.num-clients={num_sites}"])
    with superlink(link):
        for index in range(num_sites):
            register(link, new_node_key(folder / f"node{index}.key"))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("STORY", str(folder))
        for index in range(num_sites):
            stack.enter_context(started_site(site_of(folder, index, link, words)))
        yield found
    wait_until(lambda: not processes_of(folder), 60)


def site_of(folder: Path, index: int, link: Link, words: Sequence[str]) -> Path:
    """Write the site.toml of one site."""
    assert link.credentials
    (model,) = (word.removeprefix("model.name=") for word in words if word.startswith("model.name="))
    node = {
        "root-certificates": str(link.credentials.authority),
        "private-key": str(folder / f"node{index}.key"),
        "client-id": f"hospital-{index}",
        "model-path": model,
    }
    own = folder / f"site{index}"
    own.mkdir()
    return write_site(own, link.address, {f"n{index}": node})


def environment_of(story: Path) -> dict[str, str]:
    """Return the environment of a process whose family is found by `processes_of`."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "STORY": str(story)}


def kill(story: Path, program: str) -> bool:
    """Kill one process of a program, and return whether there was one."""
    for process in processes_of(story, program):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            return True
    return False


def drawn(programs: Sequence[str], seed: int) -> list[str]:
    """Return programs in a random order."""
    shuffled = list(programs)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def kill_at_random(story: Path, folder: Path, programs: Sequence[str], seed: int) -> list[Kill]:
    """Kill programs one after the other, each some time into a later round, and time the round after.

    Return the kills, which are fewer than asked for where the run has ended first.
    """
    done, number = [], random.Random(seed)
    for program in programs:
        reached = max(rounds_of(folder), default=-1) + 1
        began = time.monotonic()
        wait_until(lambda reached=reached: max(rounds_of(folder), default=-1) >= reached or has_ended(folder))
        if done:
            done[-1] = replace(done[-1], seconds=round(time.monotonic() - began, 1))
        # Within the next round, so that a fast machine does not run out of rounds, nor a slow one of time.
        records = lines_of(folder / "rounds.jsonl")[1:]
        shortest = min((record["seconds"] for record in records), default=1.0)
        time.sleep(number.random() * shortest)
        while not has_ended(folder) and not kill(story, program):
            time.sleep(0.02)  # a messenger lives for a moment only
        if has_ended(folder):
            break
        done.append(Kill(program, max(rounds_of(folder), default=-1) + 1))
    print(*done, sep="\n")
    return done


def has_ended(folder: Path) -> bool:
    """Return whether a run has said how it ended."""
    return (folder / "result.json").exists()


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Return what the lines of a file of a run say."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def words_of(tiny_run: list[str], rounds: int) -> list[str]:
    """Return the words of a run of so many rounds that no client's death ends."""
    words = [*tiny_run, f"federation.num-rounds={rounds}", "federation.join-deadline=600"]
    return [*words, "federation.max-retries=50", "federation.max-failure-rate=1.0"]


@pytest.mark.soak
def test_fifteen_kills_at_the_server_cost_no_bit(tiny_run: list[str], tmp_path: Path) -> None:
    rounds, programs = len(AT_SERVER) + 7, drawn(AT_SERVER, seed=1)
    with federation(tmp_path, words_of(tiny_run, rounds)) as sites:
        with sites.served("whole") as whole:
            pass
        with sites.served("killed") as killed:
            done = kill_at_random(tmp_path, killed, programs, seed=2)
    assert [kill.program for kill in done] == programs
    assert rounds_of(killed) == list(range(rounds + 1))
    assert result_of(killed)["digest"] == result_of(whole)["digest"]


@pytest.mark.soak
def test_fifteen_kills_at_sites_cost_a_round_each(tiny_run: list[str], tmp_path: Path) -> None:
    rounds, programs = len(AT_SITES) + 10, drawn(AT_SITES, seed=3)
    with federation(tmp_path, words_of(tiny_run, rounds)) as sites, sites.served("killed") as killed:
        done = kill_at_random(tmp_path, killed, programs, seed=4)
    assert [kill.program for kill in done] == programs
    assert sites.codes == [0], "the server itself was never started again"
    assert rounds_of(killed) == list(range(rounds + 1))
    decisions = lines_of(killed / "decisions.jsonl")  # which tells of attempts at a round that failed too
    lost = [decision["client"] for decision in decisions if decision["event"] == "refused"]
    print("answers lost:", lost)
    assert len(lost) <= len(programs)


@contextmanager
def watched_ledgers(folder: Path) -> Iterator[dict[str, set[bytes]]]:
    """Yield the contents that each file of the sites' ledgers of labels has had, filled during the block.

    A run that has ended leaves no such file.
    """
    found: dict[str, set[bytes]] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            with suppress(FileNotFoundError):  # the run has just ended, and its folders go while we look
                for file in [file for kind in ("masked", "opened") for file in folder.rglob(f"*.{kind}")]:
                    found.setdefault(str(file), set()).add(file.read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


@pytest.mark.soak
@pytest.mark.parametrize("method", ["masks", "he"])
def test_twenty_kills_of_a_masked_run_reuse_no_label(
    method: str, tiny_run: list[str], tmp_path: Path
) -> None:
    if method == "he":
        pytest.importorskip("tenseal")
    rounds, programs = len(AT_BOTH) + 8, drawn(AT_BOTH, seed=5)
    words = [*words_of(tiny_run, rounds), f"secure.method={method}"]
    with (
        federation(tmp_path, words, num_sites=3) as sites,
        watched_ledgers(tmp_path) as ledgers,
        sites.served("masked") as masked,
    ):
        done = kill_at_random(tmp_path, masked, programs, seed=6)
    assert [kill.program for kill in done] == programs
    assert rounds_of(masked) == list(range(rounds + 1))
    records = lines_of(masked / "rounds.jsonl")[1:]
    assert all(record["secure"]["answered"] >= 2 for record in records)
    assert not any(record["secure"]["faults"] for record in records)
    decisions = lines_of(masked / "decisions.jsonl")
    assert "mask-reuse" not in {decision.get("code") for decision in decisions}
    assert len(ledgers) > 2 * rounds
    assert all(len(contents) == 1 for contents in ledgers.values()), "nothing was done twice under a label"
    wait_until(lambda: not list(tmp_path.rglob("*.masked")))
