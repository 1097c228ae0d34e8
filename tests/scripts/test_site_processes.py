"""What a site's processes are started with, and what a site.toml is refused for before any of them is."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.site_policy import load_policy
from scripts.commands.site_command import start
from scripts.runtimes import site as module
from scripts.runtimes.site import last_words, running_site
from tests.site_builder import write_site

Started = dict[str, tuple[list[str], Mapping[str, str]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Start `sleep` in place of each process; return what each was to be, by the name of its log."""
    found: Started = {}

    def sleep(
        command: list[str], folder: Path, environment: Mapping[str, str], log: Path, **options: Any
    ) -> "subprocess.Popen[bytes]":
        found[log.stem] = command, environment
        return subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, start_new_session=True)

    monkeypatch.setattr(module, "start_guarded", sleep)
    return found


def test_a_site_finds_no_program_but_its_own(started: Started, tmp_path: Path) -> None:
    with running_site(load_policy(write_site(tmp_path, "127.0.0.1:1", {"a": {}}))):
        (folder,) = started["superexec-a"][1]["PATH"].split(os.pathsep)
        assert os.listdir(folder) == ["flwr-clientapp"], "Flower's own would run what the server ships"


def test_a_noexec_temporary_folder_is_refused(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as the system answers there
    policy = load_policy(write_site(tmp_path, "127.0.0.1:1", {"a": {}}))
    with pytest.raises(ConfigError, match="mounted noexec; set TMPDIR"), running_site(policy):
        pass
    assert "superexec-a" not in started


def test_a_second_site_leaves_the_socket_of_the_first(started: Started, tmp_path: Path) -> None:
    policy = load_policy(write_site(tmp_path, "127.0.0.1:1", {"a": {}}))
    with running_site(policy) as first:
        with pytest.raises(ConfigError, match="another site's service listens"), running_site(policy):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            assert client.connect_ex(str(first.socket)) == 0
    assert not first.socket.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may start processes of others")
def test_nodes_are_not_of_root_by_an_oversight(started: Started, tmp_path: Path) -> None:
    policy = load_policy(write_site(tmp_path, "127.0.0.1:1", {"a": {}}, site={"user": "nobody"}))
    with pytest.raises(ConfigError, match="node-user must be set too"), running_site(policy):
        pass
    assert not started


def test_a_node_without_a_server_is_refused(started: Started, tmp_path: Path) -> None:
    policy = load_policy(write_site(tmp_path, "", {"a": {}}))
    with pytest.raises(ConfigError, match=r"nodes\.a\.superlink must be set"), running_site(policy):
        pass
    assert not started


def test_ones_own_home_is_that_of_the_environment(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # a container's user may have none in its list of users
    with running_site(load_policy(write_site(tmp_path, "127.0.0.1:1", {"a": {}}))):
        assert {environment["HOME"] for _, environment in started.values()} == {str(tmp_path)}


def test_last_words_of_a_long_log_are_its_last(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    log.write_text("x" * 9000 + "\nthe end\n\n")
    assert last_words(log) == "the end"
    assert last_words(tmp_path / "none.log") == "without a word"


@pytest.mark.skipif(os.getuid() != 0, reason="only root may start processes of others")
def test_rows_that_the_nodes_user_can_read_are_told(
    started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # so that other users may enter it
    try:
        file = write_site(folder, "127.0.0.1:1", {"a": {}}, site={"node-user": "nobody"})
        told = []
        for mode in (0o700, 0o755):
            (folder / "data").chmod(mode)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module.Site, "tend", lambda site, tell: None)
                start(file)
            told.append("nobody can read" in capsys.readouterr().out.replace("\n", " "))
    finally:
        shutil.rmtree(folder)
    assert told == [False, True]
