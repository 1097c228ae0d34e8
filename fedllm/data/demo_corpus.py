"""The default corpus: what installed packages say about their own functions.

A row asks with a signature, `def name(args) -> result`, and answers with the first sentence of its docstring;
a package is a client. Nothing is downloaded, shipped or imported: sources that are on the machine anyway are
parsed. The same versions give the same rows.
"""

import ast
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.data.installed_packages import Package, installed_packages, licence_of, source_files
from fedllm.data.licences import permits
from fedllm.errors import DataError
from fedllm.files import cache_folder, write_file

# Well known, clearly licensed (Apache-2.0, BSD, MIT, PSF) and rich in docstrings, best first
_PREFERRED = (
    *("numpy", "torch", "transformers", "datasets", "peft", "accelerate", "huggingface_hub", "flwr", "ray"),
    *("python", "pandas", "networkx", "sympy", "pyarrow", "sqlalchemy", "fsspec"),
)
_MOST_ROWS = 400  # of a package
_MOST_ROWS_OF_FILE = 25  # keeps one long file from speaking for its package
_MOST_BYTES_OF_FILE = 60_000  # longer ones are mostly tables and take long to parse
_LONGEST_SIGNATURE = 200
_SHORTEST_SENTENCE, _LONGEST_SENTENCE = 20, 200

_SENTENCE = re.compile(r".*?[.!?](?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!etc\.)(?<!cf\.)(?=\s|$)")
# Markup, doctests, field lists, links and announcements of a list in place of a sentence
_NOT_A_SENTENCE = re.compile(r"(>>>|\.\. |:\w+|@\w+|[-=*#`]|\w+:(\s|$)|.*://|.*:$)")
_DUNDER = re.compile(r"__\w+__")


@dataclass(frozen=True)
class _Pair:
    prompt: str
    response: str


_Reader: TypeAlias = Callable[[Path], tuple[_Pair, ...]]  # of one source file


def docstring_rows(
    num_clients: int, *, min_rows: int = 60, licences: frozenset[str] = frozenset()
) -> tuple[dict[str, str], ...]:
    """Return the corpus of `num_clients` packages as rows of `prompt`, `response`, `client` and `licence`.

    Preferred packages come first, then those with most rows, so fewer clients are a prefix of more. No answer
    appears twice, in one package or in two. A package gives at most 400 rows, spread over its files.

    Args:
        num_clients: packages to read.
        min_rows: a package with fewer rows is passed over.
        licences: so is one whose licence these do not allow (`parse_licences`); none of them allow any.

    Raises:
        DataError: fewer packages have `min_rows` rows.
    """
    chosen = _chosen_pairs(num_clients, min_rows, licences)
    if len(chosen) < num_clients:
        raise DataError(
            f"docstrings: only {len(chosen)} installed packages have {min_rows} rows"
            f"{' and a licence of data.licences' if licences else ''}, {num_clients} wanted; "
            f"set federation.num-clients to at most {len(chosen)} or name your own data.source"
        )
    return tuple(
        {"prompt": pair.prompt, "response": pair.response, "client": package.name, "licence": licence}
        for package, pairs in chosen.items()
        for licence in [licence_of(package)]
        for pair in pairs
    )


def first_sentence(docstring: str) -> str:
    r"""Return the first sentence of `docstring` on one line, or "" where it has no usable one.

    A summary paragraph without a full stop counts whole. Usable is plain ASCII of 20 to 200 characters that
    does not begin with markup.

    >>> first_sentence("Save the adapter, e.g. after a\n    round. Then return.")
    'Save the adapter, e.g. after a round.'
    """
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    sentence = match[0] if match else paragraph
    usable = _SHORTEST_SENTENCE <= len(sentence) <= _LONGEST_SENTENCE and _is_plain(sentence)
    return sentence if usable and not _NOT_A_SENTENCE.match(sentence) else ""


def _chosen_pairs(
    num_clients: int, min_rows: int, licences: frozenset[str]
) -> dict[Package, tuple[_Pair, ...]]:
    """Return the pairs of at most `num_clients` packages that have `min_rows` answers not given before."""
    packages = {
        package.name: package
        for package in installed_packages()
        if not licences or permits(licence_of(package), licences)
    }
    files = _KnownFiles()
    chosen: dict[Package, tuple[_Pair, ...]] = {}
    seen: set[str] = set()
    for package in _ranked(packages, files.pairs):
        pairs = _package_pairs(package, files.pairs, seen)
        if len(pairs) >= max(1, min_rows):
            chosen[package] = pairs
            seen |= {pair.response for pair in pairs}
        if len(chosen) == num_clients:  # before the next is asked for: it may need the ranking
            break
    files.keep()
    return chosen


class _KnownFiles:
    """What source files say. It is kept in the user's cache: to parse them all anew takes seconds a run.

    A file is known by its path, size and time of change, and by the very code that has read it.
    """

    def __init__(self) -> None:
        reader = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()
        self._cache = cache_folder() / f"docstrings-{reader[:16]}.json"
        self._read: dict[str, list[list[str]]] = {}
        known: Any = None
        with suppress(OSError, ValueError):  # not there, or damaged: all is read anew
            known = json.loads(self._cache.read_text())
        self._known: dict[str, list[list[str]]] = known if _is_known(known) else {}

    def pairs(self, file: Path) -> tuple[_Pair, ...]:
        """Return a file's pairs; ranking and choosing ask for the same files."""
        try:
            status = file.stat()
        except OSError:
            return ()
        key = f"{file} {status.st_size} {status.st_mtime_ns}"
        if key not in self._read:
            known = self._known.get(key)
            self._read[key] = [[p.prompt, p.response] for p in _file_pairs(file)] if known is None else known
        return tuple(_Pair(prompt, response) for prompt, response in self._read[key])

    def keep(self) -> None:
        """Keep what was read, if any of it was new."""
        if self._read.keys() - self._known.keys():
            with suppress(OSError):  # a cache that cannot be written only costs the next run its time
                write_file(self._cache, json.dumps(self._read))


def _is_known(known: Any) -> bool:
    """Return whether a cache holds what is kept there: lists of pairs of texts."""
    if not isinstance(known, dict) or not all(isinstance(pairs, list) for pairs in known.values()):
        return False
    found = [pair for pairs in known.values() for pair in pairs]
    return all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in found)


def _ranked(packages: Mapping[str, Package], read: _Reader) -> Iterator[Package]:
    """Yield the preferred packages, then the others, those with most rows first."""
    yield from (packages[name] for name in _PREFERRED if name in packages)
    # Ranking reads every other package, so it comes only where the preferred ones are too few.
    others = [package for name, package in packages.items() if name not in _PREFERRED]
    yield from sorted(others, key=lambda package: (-len(_package_pairs(package, read, set())), package.name))


def _package_pairs(package: Package, read: _Reader, seen: set[str]) -> tuple[_Pair, ...]:
    """Return the pairs of `package`, in reading order, whose answers are not in `seen`."""
    pairs: dict[str, _Pair] = {}
    for file in source_files(package):
        fresh = {pair.response: pair for pair in read(file) if pair.response not in seen}
        new = [pair for response, pair in fresh.items() if response not in pairs]
        pairs.update((pair.response, pair) for pair in _spread(new, _MOST_ROWS_OF_FILE))
        if len(pairs) >= _MOST_ROWS:
            break
    return tuple(pairs.values())[:_MOST_ROWS]


def _spread(pairs: list[_Pair], most: int) -> list[_Pair]:
    if len(pairs) <= most:
        return pairs
    return [pairs[index * len(pairs) // most] for index in range(most)]


def _file_pairs(file: Path) -> tuple[_Pair, ...]:
    try:
        content = file.read_bytes() if file.stat().st_size <= _MOST_BYTES_OF_FILE else b""
        if b'"""' not in content and b"'''" not in content:
            return ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            module = ast.parse(content)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ()  # templates and sources of another Python version
    return tuple(pair for function in _functions(module) if (pair := _pair(function)) is not None)


def _functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield functions and methods, not those inside functions: they are rarely documented."""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _functions(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child


def _pair(function: ast.FunctionDef | ast.AsyncFunctionDef) -> _Pair | None:
    docstring = None if _DUNDER.fullmatch(function.name) else ast.get_docstring(function)
    response = first_sentence(docstring or "")
    if not response:
        return None
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    prompt = f"{keyword} {function.name}({ast.unparse(function.args)}){result}"
    if len(prompt) > _LONGEST_SIGNATURE or not _is_plain(prompt):
        return None
    return _Pair(prompt, response)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()
