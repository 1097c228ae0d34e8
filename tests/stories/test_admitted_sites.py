"""Three sites with keys of their own join a served run over TLS; the server's list admits two of them."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedllm.identity import new_key, public_text
from scripts.deploying.certificates import new_credentials, new_node_key
from scripts.runtimes.processes import Link, free_port, register, superlink
from tests.site_builder import started_site, write_site
from tests.stories.conftest import processes_of, result_of
from tests.stories.test_kills import environment_of

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc"),
]


def site_of(folder: Path, name: str, link: Link, words: Sequence[str]) -> Path:
    """Make the keys of a site and write its site.toml."""
    assert link.credentials
    (model,) = (word.removeprefix("model.name=") for word in words if word.startswith("model.name="))
    register(link, new_node_key(folder / name / "node.key"))
    node = {
        "root-certificates": str(link.credentials.authority),
        "private-key": "node.key",
        "client-id": name,
        "model-path": model,
    }
    return write_site(folder / name, link.address, {name: node}, site={"key": "site.key"})


def test_sites_of_the_list_run_and_a_stranger_is_named(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORY", str(tmp_path))
    names, state = ("north", "south", "stranger"), tmp_path / "server"
    state.mkdir()
    link = Link(state, free_port(), new_credentials(tmp_path / "credentials", []))
    keys = {name: public_text(new_key(tmp_path / name / "site.key")) for name in names}
    admitted = "".join(f'[sites.{n}]\npublic-key = "{keys[n]}"\nclients = ["{n}"]\n' for n in names[:2])
    (tmp_path / "sites.toml").write_text(admitted)
    with superlink(link):
        sites = [site_of(tmp_path, name, link, tiny_run) for name in names]
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(started_site(site))
        words = [*tiny_run, "federation.num-clients=3", f"federation.sites={tmp_path / 'sites.toml'}"]
        words += ["federation.min-clients=2", "federation.join-deadline=90.0", "run.name=admitted"]
        assert link.credentials
        done = subprocess.run(
            [
                *(sys.executable, "-m", "fedllm", "serve", *words, "--out", str(tmp_path)),
                *("--credentials", str(link.credentials.folder), "--state", str(state)),
                *("--port", str(link.port)),
            ],
            env=environment_of(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    assert result_of(tmp_path / "admitted")["status"] == "completed"
    assert not processes_of(tmp_path)
    decided = (tmp_path / "admitted" / "decisions.jsonl").read_text()
    told = done.stdout + decided
    assert f"its site's key, {keys['stranger'][:24]}..., is not in federation.sites" in told, told[-3000:]
    rounds = (tmp_path / "admitted" / "rounds.jsonl").read_text()
    assert '"north"' in rounds
    assert '"south"' in rounds
    assert '"stranger"' not in rounds
