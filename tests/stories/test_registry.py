"""A model over two runs: a version, one retrained from it, and the way back."""

import shutil
from pathlib import Path

from clients.client_app import app
from fedllm.identity import new_key, public_text
from fedllm.registry.registry import Registry
from fedllm.runs.folder import START
from scripts.recipe_arguments import config_of
from scripts.runtimes.local import local_grid
from strategies.run import run_federation


def done(words: list[str], folder: Path) -> Path:
    """Do a run of one round in this process, and return its folder."""
    own = ["federation.num-rounds=1", f"run.output={folder.parent}", f"run.name={folder.name}"]
    config = config_of([*words, *own, "run.purpose=letters"])
    run_federation(config, local_grid(config, app))
    return folder


def test_a_retrained_version_is_promoted_and_rolled_back(tiny_run: list[str], tmp_path: Path) -> None:
    key = new_key(tmp_path / "signing.key")
    registry = Registry(tmp_path / "registry" / "letters")
    first = registry.add(done(tiny_run, tmp_path / "first"), key)
    said = first.statement
    assert (said.name, said.version, said.parents, said.run["name"]) == ("letters", 1, (), "first")
    assert (said.clients["number"], said.consent["purpose"], said.epsilon) == (4, "letters", None)
    digests = [said.run["plan"], said.run["config"], said.base["digest"], said.app["source"]]
    assert all(len(digest) == 64 for digest in digests)
    shutil.copytree(first.folder, tmp_path / "second" / START)
    second = registry.add(done(tiny_run, tmp_path / "second"), key)
    assert second.statement.parents == ({"relation": "retrained-from", "digest": first.weights},)
    assert [version.number for version in registry.descendants(first.number)] == [second.number]
    for version in (first, second):
        registry.promote(version.number)
    assert registry.rollback().digest == first.digest
    assert registry.verify([public_text(key)]).num_lines == 5
