"""docs/faults.md names tests that exist, at least one for every fault, and marks those that take minutes."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (\d+) \| .+\| (.+) \|$", (ROOT / "docs/faults.md").read_text(), flags=re.M)


@cache
def source(file: str) -> str:
    return (ROOT / file).read_text()


def test_the_page_has_every_fault_of_the_catalogue() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 33))


@pytest.mark.parametrize(("number", "cell"), ROWS, ids=[number for number, _ in ROWS])
def test_every_fault_names_tests_that_exist(number: str, cell: str) -> None:
    named = re.findall(r"(soak )?`(tests/[\w/]+\.py)::(test_\w+)`", cell)
    assert len(named) == cell.count("`") / 2 > 0
    for soak, file, name in named:
        before = re.search(rf"((?:^@.+\n(?:^[ )].*\n)*)*)^def {name}\(", source(file), flags=re.M)
        assert before, f"{file}::{name}"
        is_long = "soak" in before[1] or re.search(
            r"^pytestmark = (?:\[\s*)?pytest\.mark\.soak", source(file), re.M
        )
        assert bool(soak) == bool(is_long), f"{file}::{name}"
