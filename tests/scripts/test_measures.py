"""The measures of the structure: what they count, and the goals that this repository has reached."""

from pathlib import Path

import pytest

from scripts.measures import circles, measure, read_modules, repeats, two_way_pairs

ROOT = Path(__file__).parents[2]
REACHED = (
    *("file median / p90 / max", "function median / p90 / max", "widest importer", "import circles"),
    *("two-way pairs of packages", "keys of a run", "comments per 100 code lines"),
    *("places of six repeated lines", "README bytes"),
)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Return a small repository: a circle through a lazy import, two packages that import each other."""
    files = {
        "fedllm/__init__.py": '"""Nouns."""\n',
        "fedllm/one/__init__.py": "",
        "fedllm/two/__init__.py": "",
        "fedllm/one/a.py": '"""A."""\n\nfrom fedllm.two.b import B\n\nA = B  # why\n',
        "fedllm/two/b.py": "B = 1\n\n\ndef later():\n    from fedllm.one.a import A\n\n    return A\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_lines_and_comments_are_counted_apart(made: Path) -> None:
    module = read_modules(made)["fedllm.one.a"]
    assert (module.num_lines, module.num_code, module.num_comments) == (5, 2, 1)


def test_lazy_imports_count_in_circles_and_pairs(made: Path) -> None:
    modules = read_modules(made)
    assert circles({name: module.imports for name, module in modules.items()}) == [
        ["fedllm.one.a", "fedllm.two.b"]
    ]
    assert two_way_pairs(modules) == [("fedllm.one", "fedllm.two")]


def test_one_run_of_repeated_lines_is_one_place(made: Path) -> None:
    lines = "".join(f"x{number} = {number}\n" for number in range(8))
    (made / "fedllm" / "one" / "c.py").write_text(lines)
    (made / "fedllm" / "two" / "d.py").write_text("y = 0\n" + lines)
    assert repeats(read_modules(made)) == ["fedllm.one.c ~ fedllm.two.d: 8 lines"]


def test_the_goals_that_were_reached_stay_reached() -> None:
    found = measure(ROOT)
    assert [name for name in REACHED if not found[name]["met"]] == []
