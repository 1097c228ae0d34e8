"""The documentation says what is true: its commands parse, its keys, paths and links exist."""

import ast
import contextlib
import importlib.util
import itertools
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer.main
from flwr.common.config import parse_config_args

from fedllm.config.recipe import flatten, parse_overrides
from fedllm.config.run_config import KEYS as DECLARED
from fedllm.config.run_config import RunConfig
from fedllm.errors import CLIENT_ERROR_CODES
from fedllm.site_policy import load_policy
from scripts.cli import app
from scripts.pipeline.settings import read_settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ROOMS = ("fedllm", "clients", "strategies", "scripts")
SITE_TABLES = {"site", "nodes", "allow", "limits", "budget", "adapters", "peers"}  # of a site.toml
COMMAND = typer.main.get_command(app)
KEYS = RunConfig().to_flat()

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PATH = re.compile(r"(?<![\w/.~$-])(?:fedllm|clients|strategies|scripts|tests|docs|\.ci)/[\w./-]*\w")
KEY = re.compile(rf"(?:{'|'.join(sorted({key.partition('.')[0] for key in KEYS if '.' in key}))})\.[a-z-]+")
SCRIPT = re.compile(r"\bbash (\S+\.sh)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def _blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def _spans(page: Path) -> list[str]:
    return SPAN.findall(FENCE.sub("", page.read_text()))


def _commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command: lines of bash blocks, and spans that begin with a program."""
    lines = [line for block in _blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in _spans(page) if span.startswith(("fedllm ", "flwr ", "bash ", "flower-"))]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # set for this command only
            words = words[1:]
        if words:
            yield words


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _overrides(words: list[str]) -> list[str]:
    return [word for word in words if "=" in word and not word.startswith("-")]


def _slug(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pages
def test_every_fedllm_command_parses_with_allowed_keys(page: Path) -> None:
    for words in _commands(page):
        if words[0] != "fedllm":
            continue
        arguments = [word for word in words[1:] if word not in {"-v", "--verbose"}]
        if not arguments:
            continue
        assert isinstance(COMMAND, click.Group)
        assert arguments[0] in COMMAND.commands, words
        command = COMMAND.commands[arguments[0]]
        with contextlib.suppress(click.MissingParameter):  # "see `fedllm compare`" names no folders
            command.make_context(arguments[0], arguments[1:])
        RunConfig.from_flat(parse_overrides(_overrides(arguments[1:])))


@pages
def test_every_flower_command_sets_known_keys_to_allowed_values(page: Path) -> None:
    for words in _commands(page):
        for flag, value in itertools.pairwise(words):
            if flag == "--run-config" and "=" in value:
                RunConfig.from_flat(parse_config_args([value]))
            elif flag in {"--node-config", "--federation-config"}:
                assert parse_config_args([value])


@pages
def test_every_key_named_in_the_text_exists(page: Path) -> None:
    for span in _spans(page):
        found = KEY.match(span)
        is_file = span.endswith(".json")  # a run folder has a privacy.json
        if found and not is_file and (found.end() == len(span) or span[found.end()] in " ="):
            assert found[0] in KEYS, span


@pages
def test_every_repository_path_exists(page: Path) -> None:
    text = page.read_text()
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path
    for span in _spans(page):
        if re.fullmatch(r"[A-Za-z]+\.(md|toml|txt)", span) and span not in EXAMPLES:
            assert (ROOT / span).exists() or (ROOT / "docs" / span).exists(), span


EXAMPLES = {
    "config.toml",
    "letters.toml",
    "README.md",
    "recipe.toml",
    "site.toml",
    "sites.toml",
}  # files of a reader's own


@pages
def test_every_relative_link_resolves(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in {_slug(heading) for heading in HEADING.findall(file.read_text())}, target


@pages
def test_every_test_that_shows_a_claim_exists(page: Path) -> None:
    for name, target in re.findall(r"\[(test_\w+)\]\(([^)\s]+\.py)\)", page.read_text()):
        assert f"\ndef {name}(" in (page.parent / target).read_text(), f"{target} has no {name}"


def test_every_threat_has_a_test_or_is_not_covered() -> None:
    threats = (ROOT / "docs" / "threat-model.md").read_text()
    threats = threats.partition("## What each could do")[2].partition("## What each switch buys")[0]
    rows = [line for line in threats.splitlines() if line.startswith("| ") and "| could |" not in line]
    assert len(rows) > 30
    assert [row for row in rows if ("](../tests/" in row) is ("**not covered**" in row)] == []


@pages
def test_every_shell_script_is_there_and_executable(page: Path) -> None:
    for name in SCRIPT.findall(page.read_text()):
        assert os.access(ROOT / name, os.X_OK), name


@pages
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for block in _blocks(page, "python"):
        module = ast.parse(block)
        compile(module, str(page), "exec")
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ROOMS:
                file = ROOT / f"{(node.module or '').replace('.', '/')}.py"
                assert {name.name for name in node.names} <= _top_level_names(file), file


@pages
def test_recipes_are_toml_with_known_keys(page: Path, tmp_path: Path) -> None:
    for block in _blocks(page, "toml"):
        values = tomllib.loads(block)
        if (
            "superlink" in values or "sites" in values
        ):  # Flower's own configuration; the server's list of sites
            continue
        if SITE_TABLES & values.keys():
            continue
        if "trigger" in values:
            (tmp_path / "pipeline.toml").write_text(block)
            read_settings(tmp_path / "pipeline.toml")
            continue
        RunConfig.from_flat(flatten(values))


@pages
def test_a_policy_on_a_page_is_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))
    for block in _blocks(page, "toml"):
        if SITE_TABLES & tomllib.loads(block).keys():
            (tmp_path / "site.toml").write_text(block)
            load_policy()


@pages
def test_a_page_stands_on_its_own(page: Path) -> None:
    """No path of the machine it was written on."""
    text = page.read_text()
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w.])/(home|root|tmp|Users)/", text)


def test_configuration_page_is_the_generated_one() -> None:
    wanted = _generator().config_page()
    assert (ROOT / "docs" / "config.md").read_text() == wanted, "run `python docs/generate.py`"
    for row in re.findall(r"^\| `.*\|$", wanted, re.MULTILINE):
        meaning = row.strip("| ").rpartition(" | ")[2]
        assert not meaning.startswith((":", ";", ")")), row
        assert meaning.count("(") == meaning.count(")"), row


def test_every_key_has_a_meaning() -> None:
    assert all(key.meaning for key in DECLARED.values())


def test_flower_keys_are_the_generated_ones() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert _generator().with_flower_keys(text) == text, "run `python docs/generate.py`"


def test_the_tree_lists_every_module_and_nothing_else() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    generator = _generator()
    block = page.partition(generator.BEGIN)[2].partition(generator.END)[0]
    listed = set(_listed_paths(block))
    missing = {path for path in listed if not (ROOT / path).exists()}
    assert not missing, "run `python docs/generate.py`"
    modules = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.sh")}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts" / "recipes").glob("*.toml")}
    wanted = {
        path
        for path in modules | scripts | recipes
        if not path.endswith("__init__.py") and not generator.FOLDED & set(Path(path).parts)
    }
    assert wanted <= listed, f"run `python docs/generate.py`: {sorted(wanted - listed)}"


def _listed_paths(block: str) -> Iterator[str]:
    """Yield the paths of a tree: two spaces of indent for each folder above."""
    folders: list[str] = []
    for line in block.splitlines():
        name = line.strip().partition(" ")[0]
        if not name or name.startswith("```"):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        yield "".join(folders) + name.rstrip("/")
        if name.endswith("/"):
            folders.append(name)


def test_error_page_lists_the_codes_that_may_leave_a_client() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    section = text.partition("## Codes that leave a client")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)) == CLIENT_ERROR_CODES


def test_every_page_of_docs_is_listed_in_the_index() -> None:
    links = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert names <= links


def _top_level_names(file: Path) -> set[str]:
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_extra_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert [extra for extra in extras if f"`{extra}`" not in page] == []
