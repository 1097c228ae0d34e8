import json
import re
import sys
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from fedllm.data import demo_corpus
from fedllm.data.demo_corpus import docstring_rows, first_sentence
from fedllm.data.installed_packages import REQUIREMENTS, Package, installed_packages, source_files
from fedllm.errors import DataError
from tests.data.builders import write


def test_requirements_are_those_of_the_project() -> None:
    """Flower runs the project from a bundle that has none, and nodes must deal the same rows."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w.-]+(\[[\w,-]+\])?", text) for text in project["dependencies"]]
    assert sorted(REQUIREMENTS) == sorted(name[0] for name in names if name)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is kept of files that were read; all tests share it."""
    folder = tmp_path_factory.getbasetemp() / "docstrings"
    monkeypatch.setenv("FEDLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose subfolders are all the packages there are."""
    monkeypatch.setattr(
        demo_corpus,
        "installed_packages",
        lambda: tuple(Package(folder.name, folder) for folder in sorted(tmp_path.iterdir())),
    )
    return tmp_path


def function(name: str, sentence: str) -> str:
    return f'def {name}(x):\n    """{sentence}"""\n'


def answers(num_clients: int, min_rows: int = 1) -> list[tuple[str, str]]:
    return [(row["client"], row["response"]) for row in docstring_rows(num_clients, min_rows=min_rows)]


def test_eight_packages_are_disjoint_clients_of_sixty_rows() -> None:
    rows = docstring_rows(8)
    by_client: dict[str, set[str]] = {}
    for row in rows:
        assert set(row) == {"prompt", "response", "client", "licence"}
        assert row["prompt"].startswith(("def ", "async def "))
        assert len(row["prompt"]) <= 200
        assert 20 <= len(row["response"]) <= 200
        assert (row["prompt"] + row["response"]).isascii()
        assert (row["prompt"] + row["response"]).isprintable()
        by_client.setdefault(row["client"], set()).add(row["response"])
    assert len(by_client) == 8
    assert all(60 <= len(responses) <= 400 for responses in by_client.values())
    assert len(set().union(*by_client.values())) == len(rows)


def test_corpus_of_fewer_clients_is_a_prefix_of_more() -> None:
    rows = docstring_rows(3)
    assert docstring_rows(3) == rows
    assert docstring_rows(2) == rows[: len(docstring_rows(2))]


def test_nothing_is_imported_by_reading(packages: Path) -> None:
    write(packages / "trap" / "a.py", "raise SystemExit\n" + function("f", "Return the number of rows."))
    assert answers(1) == [("trap", "Return the number of rows.")]
    assert "trap" not in sys.modules


def test_a_row_asks_with_the_bare_signature(packages: Path) -> None:
    write(
        packages / "p" / "a.py",
        "class A:\n    @property\n    async def f(self, a: int = 1, *b, **c) -> 'list[int]':\n"
        '        """Return\n        the   number of rows.\n\n        More.\n        """\n        return 1\n',
    )
    assert docstring_rows(1, min_rows=1) == (
        {
            "prompt": "async def f(self, a: int=1, *b, **c) -> 'list[int]'",
            "response": "Return the number of rows.",
            "client": "p",
            "licence": "Python-2.0",
        },
    )


def test_an_answer_belongs_to_the_first_package_that_gives_it(packages: Path) -> None:
    shared = function("f", "Return the number of rows.")
    write(packages / "torch" / "a.py", shared + shared + function("g", "Return the number of rows."))
    write(packages / "numpy" / "a.py", shared)
    write(packages / "torch" / "b.py", function("h", "Return the number of columns."))
    assert answers(2) == [
        ("numpy", "Return the number of rows."),
        ("torch", "Return the number of columns."),
    ]


def test_preferred_packages_come_first_then_those_with_most_rows(packages: Path) -> None:
    for name, count in (("aaa", 1), ("bbb", 3), ("ccc", 3), ("ray", 2)):
        body = "".join(function(f"f{number}", f"Return the {name} of {number}.") for number in range(count))
        write(packages / name / "a.py", body)
    assert list(dict.fromkeys(client for client, _ in answers(4))) == ["ray", "bbb", "ccc", "aaa"]


@pytest.mark.parametrize(
    "path",
    [
        *("tests/a.py", "test_a.py", "a_test.py", "conftest.py", "a_pb2.py", ".cache/a.py", "a.txt"),
        *("_vendor/a.py", "vendored/a.py", "x/third_party/a.py", "externals/a.py"),
    ],
)
def test_tests_vendored_and_generated_code_are_not_read(packages: Path, path: str) -> None:
    write(packages / "p" / "kept.py", function("f", "Return the number of rows."))
    write(packages / "p" / path, function("g", "Return the number of columns."))
    assert answers(1) == [("p", "Return the number of rows.")]


@pytest.mark.parametrize(
    "content",
    [
        'def f(:\n    """Return."""',
        b'"""\xff"""',
        b'"""\x00"""',
        "x" + "[" * 5000 + ' """',
        '"\\d"; x = "\\d" """',
    ],
    ids=["syntax", "encoding", "null byte", "too deep", "unclosed"],
)
def test_a_file_that_cannot_be_parsed_is_passed_over(packages: Path, content: str | bytes) -> None:
    write(packages / "p" / "bad.py", content)
    write(packages / "p" / "kept.py", function("f", "Return the number of rows."))
    assert answers(1) == [("p", "Return the number of rows.")]


def test_warnings_about_other_peoples_code_are_not_shown(packages: Path) -> None:
    # pytest turns a warning that escapes into an error
    write(packages / "p" / "a.py", 'PATTERN = "\\d"\n' + function("f", "Return the number of rows."))
    assert len(answers(1)) == 1


def test_dunder_methods_and_long_signatures_are_not_asked(packages: Path) -> None:
    write(
        packages / "p" / "a.py",
        function("__len__", "Return the number of rows.")
        + function("f" * 200, "Return the number of columns.")
        + function("kept", "Return the number of cells."),
    )
    assert answers(1) == [("p", "Return the number of cells.")]


def test_a_package_is_capped_and_no_file_speaks_for_it(packages: Path) -> None:
    for file in range(30):
        body = "".join(function(f"f{number}", f"Return row {number} of {file}.") for number in range(40))
        write(packages / "p" / f"m{file}.py", body)
    responses = [response for _, response in answers(1)]
    assert len(responses) == 400
    of_file = Counter(response.split()[-1] for response in responses)
    assert max(of_file.values()) == 25
    assert len(of_file) == 16


def test_a_file_is_parsed_once_and_again_when_it_changes(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / "peft").mkdir()
    file = packages / "peft" / "m.py"
    file.write_text(function("f", "Add two numbers and return them."))
    before = answers(1)
    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "ast", None)
        assert answers(1) == before == [("peft", "Add two numbers and return them.")]
    file.write_text(function("f", "Add three numbers and return them."))
    assert answers(1) == [("peft", "Add three numbers and return them.")]


@pytest.mark.parametrize("content", ["", "[]", "{", "{KEYS: 5}", "{KEYS: [[1, 2]]}", '{KEYS: ["ab"]}'])
def test_a_damaged_cache_is_read_as_none(content: str, packages: Path, cache: Path) -> None:
    (packages / "peft").mkdir()
    (packages / "peft" / "m.py").write_text(function("f", "Add two numbers and return them."))
    before = answers(1)
    for file in cache.iterdir():
        (key,) = [key for key in json.loads(file.read_text()) if str(packages) in key]
        file.write_text(content.replace("KEYS", json.dumps(key)))
    assert answers(1) == before


def test_too_few_packages_are_refused_with_their_number(packages: Path) -> None:
    write(packages / "p" / "a.py", function("f", "Return the number of rows."))
    (packages / "empty").mkdir()
    with pytest.raises(DataError, match=r"only 1 installed packages .* 2 wanted; .*at most 1"):
        docstring_rows(2, min_rows=1)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the rows of a table. Then more.", "Return the rows of a table."),
        ("Return the rows, e.g. of a\n   table. Then more.", "Return the rows, e.g. of a table."),
        ("Return version 1.2 of the table.", "Return version 1.2 of the table."),
        ("Return the rows of a table\n\nArgs: none.", "Return the rows of a table"),
        ("Is this row the last one? Yes.", "Is this row the last one?"),
        ("Too short.", ""),
        ("Long " * 50 + ".", ""),
        ("Renvoie le dernier élément du tableau.", ""),
        (":param x: the number of rows of a table.", ""),
        (">>> rows(table) gives the number of rows", ""),
        ("Args: x, the number of rows of a table.", ""),
        ("See https://example.org for what it does.", ""),
        ("The following forms can be used here:", ""),
        ("", ""),
    ],
)
def test_a_first_sentence_is_one_plain_line_of_fair_length(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


def test_packages_are_dependencies_and_the_standard_library() -> None:
    names = [package.name for package in installed_packages()]
    assert names == sorted(set(names))
    assert {"torch", "numpy", "ray", "python", "asyncio"} <= set(names)  # ray is Flower's simulation extra
    assert not {"pytest", "hypothesis", "mypy", "test", "idlelib"} & set(names)


def test_an_installed_fedllm_says_itself_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        "rich>=14,<15",
        "flwr[simulation] >= 1.41 ; python_version > '3'",
        "pytest; extra == 'test'",
        "absent",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: listed)
    names = {package.name for package in installed_packages()}
    assert {"rich", "pygments", "markdown_it", "flwr", "ray", "python"} <= names
    assert not {"torch", "transformers", "pytest"} & names


def test_source_files_keep_their_order_when_one_is_added(tmp_path: Path) -> None:
    for name in "abcdefgh":
        write(tmp_path / f"{name}.py", "")
    before = source_files(Package("p", tmp_path))
    write(tmp_path / "new.py", "")
    assert before != sorted(before)
    assert [file for file in source_files(Package("p", tmp_path)) if file.stem != "new"] == before
