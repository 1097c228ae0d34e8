"""A site as its owner starts it: two nodes, one service, and where root runs the tests, two Unix users."""

import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.cli.build import build_fab_from_disk

from fedllm.config.run_config import RunConfig
from fedllm.files import read_toml
from fedllm.runs.lineage import source_digest
from scripts.recipe_arguments import config_of
from scripts.runtimes.processes import Link, superlink, temporary_link
from scripts.runtimes.submitting import app_folder, submit
from tests.site_builder import ROOT, children_of, health_of, started_site, wait_for, write_site

OWNER, MESSENGER = "daemon", "nobody"  # accounts that every Unix has
NODES = ("anna", "ben")


@dataclass(frozen=True)
class Started:
    """A site that takes part in runs of a server on this machine."""

    folder: Path
    link: Link
    process: "subprocess.Popen[str]"
    config: RunConfig
    has_two_users: bool

    def run(self, name: str) -> dict[str, Any]:
        """Do a run, and return what it says of its end."""
        config = self.config.override({"run.name": name})
        submit(self.link, config, {})
        result = self.folder / "runs" / name / "result.json"
        wait_for(result.exists, "the run's end")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def python_of_all() -> tuple[str, str]:
    """Return a Python that any user may run, and where it finds our packages; "" where there is none."""
    packages = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    for python in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        try:
            done = subprocess.run(
                [python, "-c", "import clients.client_app"],
                env={"PATH": os.defpath, "PYTHONPATH": packages, "HOME": "/"},
                user=MESSENGER,
                group=pwd.getpwnam(MESSENGER).pw_gid,
                extra_groups=[],
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python, packages
    return "", ""


@pytest.fixture(scope="module")
def site(make_model_folder: Callable[..., Path]) -> Iterator[Started]:
    """A SuperLink and a site of two nodes; its folder is one that other users may enter."""
    python, packages = python_of_all() if os.getuid() == 0 else ("", "")
    folder = Path(tempfile.mkdtemp(prefix="site-"))
    folder.chmod(0o755)
    model = shutil.copytree(make_model_folder(), folder / "model")
    users = {"user": OWNER, "node-user": MESSENGER} if python else {}
    own = {"model-path": str(model), "server-paths": False}
    words = ["quickstart.toml", f"model.name={model}", "federation.num-clients=2", "federation.num-rounds=1"]
    words += ["federation.join-deadline=300", "model.device=cpu", "lora.rank=2", "train.local-steps=2"]
    words += ["evaluation.prompts=", "distill.when=never", f"run.output={folder / 'runs'}"]
    try:
        with temporary_link(is_hardened=False) as link, superlink(link):
            allow = {"bundles": [bundle_of(link)]}
            file = write_site(folder, link.address, dict.fromkeys(NODES, own), site=users, allow=allow)
            for private in (model, folder / "data"):
                hand_over(private, OWNER if python else "")
            with started_site(file, python or sys.executable, packages) as process:
                yield Started(folder, link, process, config_of(words), bool(python))
    finally:
        shutil.rmtree(folder)


def bundle_of(link: Link) -> str:
    """Return the SHA-256 of what `flwr run` ships."""
    with warnings.catch_warnings(action="ignore"):  # Flower uses a deprecated name of pathspec
        return hashlib.sha256(build_fab_from_disk(app_folder(link))).hexdigest()


def hand_over(folder: Path, owner: str) -> None:
    """Give a folder to a user, for them alone."""
    folder.chmod(0o700)
    for path in (folder, *folder.rglob("*")):
        if owner:
            shutil.chown(path, owner)


@pytest.mark.soak
def test_a_bundle_that_is_not_pinned_gets_nothing(site: Started) -> None:
    file = site.folder / "site.toml"
    before = file.read_text()
    other = {**read_toml(file), "allow": {"bundles": ["0" * 64]}}
    file.write_text(tomli_w.dumps(other))  # read anew for every question
    try:
        result = site.run("refused")
    finally:
        file.write_text(before)
    assert result["status"] == "failed"
    assert "policy" in result["reason"]
    log = (site.folder / "state" / "logs" / "service.log").read_text()
    assert "policy: " in log
    assert "[allow] bundles does not name" in log


@pytest.mark.slow
def test_a_site_does_a_run_keeps_what_is_private_and_leaves_nothing(site: Started) -> None:
    """One test: each of several test processes would start a site of its own."""
    check_a_run_completes_and_its_code_is_never_unpacked(site)
    if site.has_two_users:
        check_the_messengers_user_reads_neither_data_nor_keys_nor_state(site)
    check_nothing_of_a_killed_site_is_left(site)
    if not site.has_two_users:
        pytest.skip("all but two users: needs root, and a Python that other users may run")


def check_a_run_completes_and_its_code_is_never_unpacked(site: Started) -> None:
    assert site.run("one")["status"] == "completed"
    app = json.loads((site.folder / "runs" / "one" / "lineage.json").read_text())["app"]
    assert app == {"source": source_digest(), "bundle": bundle_of(site.link)}, "what is signed of its code"
    health = health_of(site.folder / "door" / "site.sock")
    assert not health["is-unloaded"], "the base model stays loaded"
    unpacked = [
        path
        for home in Path(tempfile.gettempdir()).glob("fedllm-site-*/*/home")
        for path in home.rglob("*.py")
    ]
    assert unpacked == []


def check_the_messengers_user_reads_neither_data_nor_keys_nor_state(site: Started) -> None:
    owners = {command: user_of(pid) for pid, command in children_of(site.process.pid).items()}
    assert {user for command, user in owners.items() if "clients.service" in command} == {OWNER}
    flower = {user for command, user in owners.items() if "clients.flower_programs" in command}
    assert flower == {MESSENGER}
    for private in (
        "data/anna.jsonl",
        "model/config.json",
        "state",
        "state/log.jsonl",
        "state/logs/service.log",
    ):
        path = site.folder / private
        assert path.exists(), private
        assert not may_read(MESSENGER, path), private
    # Its environment holds the digests of all nodes' launch keys.
    (service,) = (pid for pid, command in children_of(site.process.pid).items() if is_service(command))
    assert not may_read(MESSENGER, Path(f"/proc/{service}/environ"))


def is_service(command: str) -> bool:
    return "clients.service" in command and "guard.py" not in command


def user_of(process: int) -> str:
    return pwd.getpwuid(Path(f"/proc/{process}").stat().st_uid).pw_name


def may_read(user: str, path: Path) -> bool:
    entry = pwd.getpwnam(user)
    command = ["ls", str(path)] if path.is_dir() else ["cat", str(path)]
    done = subprocess.run(
        command, user=entry.pw_uid, group=entry.pw_gid, extra_groups=[], capture_output=True, check=False
    )
    return done.returncode == 0


def check_nothing_of_a_killed_site_is_left(site: Started) -> None:
    """End the site as the system's own killer would."""
    wait_for(lambda: len(children_of(site.process.pid)) >= 10, "five programs, each under its guard")
    left = children_of(site.process.pid)
    site.process.kill()
    wait_for(lambda: not any(is_alive(process) for process in left), f"the end of {left}")


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
