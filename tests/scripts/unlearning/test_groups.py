"""Class C: forgetting a client of a group gives the bits of a run of groups that never had it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.adapters.folder import load_adapter
from fedllm.errors import ConfigError
from fedllm.runs.folder import run_folder, to_toml
from fedllm.runs.unlearning import read_unlearning
from scripts.commands.run_command import run_in_groups
from scripts.unlearning.groups import redo_group, run_groups
from strategies.unlearning.groups import group_in_folder, read_groups
from strategies.unlearning.guarantee import guarantee_of


def test_a_group_done_again_is_a_run_that_never_had_the_client(
    make_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    once = {"federation.num-rounds": 1}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(make_config(overrides=once)))
    run_in_groups([str(recipe)], 4, runtime="local", out=None, as_json=True)
    before = run_folder(make_config())
    assert json.loads(capsys.readouterr().out)["digest"] == load_adapter(before / "adapter").state.digest
    assert guarantee_of(before, "ben").kind == "C"
    other = next(one for one in read_groups(before) if one != group_in_folder(before, "ben"))
    (before.parent / "after" / "groups" / str(other)).mkdir(parents=True)  # as a killed call leaves it
    after = redo_group(before, "ben", "after")
    never = run_groups(make_config(("anna", "cleo", "dora"), {**once, "run.name": "never"}), 4)
    digests = [load_adapter(one / "adapter").state.digest for one in (before, after, never)]
    assert digests[0] != digests[1] == digests[2]
    told = read_unlearning(after)
    assert told is not None
    assert (told.kind, told.method) == ("C", "group")
    assert "ben" not in str(read_groups(after))
    with pytest.raises(ConfigError, match="in no group"):
        guarantee_of(after, "ben")


def test_groups_are_dealt_where_the_rows_are() -> None:
    with pytest.raises(ConfigError, match="--runtime local"):
        run_in_groups([], 2, runtime="deployment", out=None, as_json=True)


@pytest.mark.parametrize("keys", [{"aggregation.preset": "flora"}, {"privacy.epsilon": 8.0}])
def test_groups_need_one_plain_adapter_each(keys: dict, make_config: Callable) -> None:
    with pytest.raises(ConfigError, match="groups of clients"):
        run_groups(make_config(overrides=keys), 2)
