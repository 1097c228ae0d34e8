"""Class C: forgetting a client of a group gives the bits of a run of groups that never had it."""

from collections.abc import Callable

import pytest

from fedllm.adapters.folder import load_adapter
from fedllm.errors import ConfigError
from fedllm.runs.unlearning import read_unlearning
from scripts.unlearning.groups import read_groups, redo_group, run_groups
from strategies.unlearning.guarantee import guarantee_of


def test_a_group_done_again_is_a_run_that_never_had_the_client(make_config: Callable) -> None:
    before = run_groups(make_config(), 2)
    assert guarantee_of(before, "ben").kind == "C"
    after = redo_group(before, "ben", "after")
    never = run_groups(make_config(("anna", "cleo", "dora"), {"run.name": "never"}), 2)
    digests = [load_adapter(one / "adapter").state.digest for one in (before, after, never)]
    assert digests[0] != digests[1] == digests[2]
    told = read_unlearning(after)
    assert told is not None
    assert (told.kind, told.method) == ("C", "group")
    assert "ben" not in str(read_groups(after))
    with pytest.raises(ConfigError, match="in no group"):
        redo_group(after, "ben", "again")


@pytest.mark.parametrize("keys", [{"aggregation.preset": "flora"}, {"privacy.epsilon": 8.0}])
def test_groups_need_one_plain_adapter_each(keys: dict, make_config: Callable) -> None:
    with pytest.raises(ConfigError, match="groups of clients"):
        run_groups(make_config(overrides=keys), 2)
