"""What a client keeps for secret sums: one vector and one list of answers for each label, whoever asks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clients.run_keys import RunKeys, run_keys
from fedllm.errors import CheckpointError, MaskReuseError, SecureError
from fedllm.plan.run_plan import resolve

LABEL, OTHER = bytes(range(32)), bytes(32)


@pytest.fixture
def keys(tmp_path: Path) -> RunKeys:
    return RunKeys(tmp_path / "secure" / "run" / "anna")


def test_the_key_is_made_once_and_is_this_users_alone(keys: RunKeys) -> None:
    assert RunKeys(keys.folder).private == keys.private
    assert keys.secret not in (keys.private, RunKeys(keys.folder.with_name("ben")).secret)
    assert (keys.folder / "key").stat().st_mode & 0o777 == 0o600
    assert keys.folder.stat().st_mode & 0o777 == 0o700


def test_another_run_or_configuration_has_another_key(make_config: Callable, tmp_path: Path) -> None:
    runs = [{}, {"run.name": "other"}, {"seed": 1}]
    plans = [resolve(make_config(**changes)) for changes in runs]
    assert len({run_keys(tmp_path, plan, "anna").private for plan in plans}) == 3
    assert run_keys(tmp_path, plans[0], "anna").private == run_keys(tmp_path, plans[0], "anna").private


@pytest.mark.parametrize("what", ["masked", "opened"])
def test_a_label_is_used_for_one_thing(what: str, keys: RunKeys) -> None:
    keys.note(LABEL, what, {"vector": "a"})
    again = RunKeys(keys.folder)  # as another process has it
    again.note(LABEL, what, {"vector": "a"})
    with pytest.raises(MaskReuseError, match="nothing leaves under it now"):
        again.note(LABEL, what, {"vector": "b"})
    again.note(OTHER, what, {"vector": "b"})


def test_only_what_was_masked_is_found(keys: RunKeys) -> None:
    with pytest.raises(SecureError, match="nothing was masked under label 00010203"):
        keys.noted(LABEL)
    keys.note(LABEL, "masked", {"parties": [["anna", "00"]]})
    assert keys.noted(LABEL) == {"parties": [["anna", "00"]]}
    (keys.folder / f"{LABEL.hex()}.masked").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        keys.noted(LABEL)


def test_what_cannot_be_kept_does_not_leave(keys: RunKeys) -> None:
    keys.folder.parent.mkdir(parents=True)
    keys.folder.write_text("no folder")
    with pytest.raises(CheckpointError, match="no masked answer leaves"):
        keys.note(LABEL, "masked", {})


def test_after_the_run_nothing_is_left(keys: RunKeys) -> None:
    before = keys.private
    keys.note(LABEL, "masked", {})
    keys.forget()
    assert not keys.folder.exists()
    assert keys.private != before
    RunKeys(keys.folder.with_name("nobody")).forget()  # nothing was kept


def test_a_key_that_cannot_be_removed_is_said_in_a_line(keys: RunKeys) -> None:
    (keys.folder / "key").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="the run it is of is over; remove it"):
        keys.forget()
