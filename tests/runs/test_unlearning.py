from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from fedllm.runs.unlearning import UNLEARNING, UNLIKE, Unlearning, read_unlearning, write_unlearning

APPROXIMATE = Unlearning(kind="D", method="ascent", parent="a" * 64, reason="updates came late")


def test_a_run_that_unlearnt_nothing_has_no_record(tmp_path: Path) -> None:
    assert read_unlearning(tmp_path) is None


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_unlearning(tmp_path, APPROXIMATE)
    assert read_unlearning(tmp_path) == APPROXIMATE


def test_an_approximation_never_claims_a_guarantee() -> None:
    assert "no guarantee" in APPROXIMATE.guarantee
    assert "nobody has compared" in APPROXIMATE.guarantee
    told = Unlearning(kind="D", method="ascent", parent="", verification={"canary exposure": UNLIKE})
    assert "canary exposure: unlike retraining" in told.guarantee


def test_each_class_says_its_own_guarantee() -> None:
    exact = Unlearning(kind="A", method="replay", parent="", rounds=7).guarantee
    parts = Unlearning(kind="C", method="group", parent="", rounds=3).guarantee
    assert ("class A" in exact, "7" in exact) == (True, True)
    assert ("class C" in parts, "3" in parts) == (True, True)


@pytest.mark.parametrize("damage", ["{}", "[1]", '{"class": "D"', '{"class": "A", "guarantee": "exact"}'])
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    (tmp_path / UNLEARNING).write_text(damage)
    with pytest.raises(ConfigError, match=UNLEARNING):
        read_unlearning(tmp_path)


def test_a_guarantee_changed_by_hand_is_refused(tmp_path: Path) -> None:
    write_unlearning(tmp_path, APPROXIMATE)
    file = tmp_path / UNLEARNING
    file.write_text(file.read_text().replace("no guarantee", "exact"))
    with pytest.raises(ConfigError, match="damaged"):
        read_unlearning(tmp_path)
