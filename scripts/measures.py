"""The structure of this repository in numbers: `python -m scripts.measures [--checkout FOLDER] [--json]`.

Size, imports, circles, comments, keys and repeated lines, each with the goal that the project sets itself.
The core is what runs at a data holder and at the server: `fedllm`, `clients` and `strategies`. A code line
is a line that is not blank, not a comment and not part of a docstring.
"""

import ast
import io
import itertools
import json
import re
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

CORE = ("fedllm", "clients", "strategies")
ROOMS = (*CORE, "scripts")
SHORTEST_REPEAT = 6  # lines
_WITH_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its lines, comments, imports and the lengths of its functions."""

    name: str
    num_lines: int  # all of them
    num_code: int
    num_comments: int
    function_lines: tuple[int, ...]  # without decorators, docstrings included
    imports: frozenset[str]  # modules of this repository, TYPE_CHECKING and lazy imports counted
    num_imported: int  # the same, but several modules of one `from package import` count once
    lines: tuple[str, ...]  # code lines in order, white space folded; imports left out

    @property
    def is_core(self) -> bool:
        """Whether it runs at a data holder or at the server."""
        return self.name.partition(".")[0] in CORE


def read_modules(root: Path) -> dict[str, Module]:
    """Return every module of the four rooms below `root`, by dotted name."""
    found = [file for room in ROOMS for file in sorted((root / room).rglob("*.py"))]
    files = {_dotted(file.relative_to(root)): file for file in found}
    return {name: _read(name, file.read_text(), files.keys()) for name, file in files.items()}


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _read(name: str, text: str, known: Collection[str]) -> Module:
    tree = ast.parse(text)
    docstrings, imports = _docstring_lines(tree), _import_lines(tree)
    stripped = enumerate(map(str.strip, text.splitlines()), 1)
    code = [(n, line) for n, line in stripped if line and not line.startswith("#") and n not in docstrings]
    statements = [line for n, line in code if n not in imports and re.search(r"\w", line)]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return Module(
        name=name,
        num_lines=text.count("\n"),
        num_code=len(code),
        num_comments=sum(token.type == tokenize.COMMENT for token in tokens),
        function_lines=tuple((node.end_lineno or node.lineno) - node.lineno + 1 for node in functions),
        imports=frozenset(_imports(tree, known)) - {name},
        num_imported=len(set().union(*map(_imported_from, ast.walk(tree)))),
        lines=tuple(re.sub(r"\s+", " ", line) for line in statements),
    )


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node) is not None:
            lines |= _lines_of(node.body[0])
    return lines


def _import_lines(tree: ast.Module) -> set[int]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return set[int]().union(*map(_lines_of, found))


def _lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _imported_from(node: ast.AST) -> set[str]:
    """Return the module that a `from` import names, where it is one of ours."""
    name = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    return {name} if name.partition(".")[0] in ROOMS else set()


def _imports(tree: ast.Module, known: Collection[str]) -> Iterator[str]:
    """Yield the modules of this repository that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            yield from modules
            if node.module in known and len(modules) < len(node.names):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & set(known)


def circles(graph: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle (Tarjan's algorithm)."""
    index, low, stack, found = dict[str, int](), dict[str, int](), list[str](), list[list[str]]()

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def two_way_pairs(modules: Mapping[str, Module]) -> list[tuple[str, str]]:
    """Return the pairs of packages of which each imports the other; a package and its parent are no pair."""
    package = {name: name.rpartition(".")[0] or name for name in modules}
    edges = {(package[name], package[other]) for name, module in modules.items() for other in module.imports}
    return sorted(
        (one, two)
        for one, two in edges
        if one < two and (two, one) in edges and not f"{two}.".startswith(f"{one}.")
    )


def repeats(modules: Mapping[str, Module]) -> list[str]:
    """Return the places where six or more code lines in a row stand in two modules, or twice in one."""
    places = defaultdict[tuple[str, ...], list[tuple[str, int]]](list)
    for module in modules.values():
        for start in range(len(module.lines) - SHORTEST_REPEAT + 1):
            places[module.lines[start : start + SHORTEST_REPEAT]].append((module.name, start))
    pairs = Counter[tuple[str, str, int]]()
    for same in places.values():
        for (one, at), (two, there) in itertools.combinations(same, 2):
            pairs[one, two, there - at] += 1  # windows of one long run have the same distance
    return [
        f"{one} ~ {two}: {number + SHORTEST_REPEAT - 1} lines"
        for (one, two, _), number in pairs.most_common()
    ]


def measure(root: Path) -> dict[str, dict[str, object]]:
    """Return by name the value of every measure, its goal, and whether it is met."""
    modules = read_modules(root)
    core = [module for module in modules.values() if module.is_core]
    sizes = [module.num_lines for module in core if module.num_code]
    functions = [length for module in core for length in module.function_lines]
    widest = max(core, key=lambda module: len(module.imports))
    pyproject = (root / "pyproject.toml").read_text()
    num_keys = len(re.findall(r"^[\w.-]+ = ", pyproject.partition("[tool.flwr.app.config]")[2], re.MULTILINE))
    num_code = sum(module.num_code for module in core)
    comments = 100 * sum(module.num_comments for module in core) / num_code
    per_module = statistics.mean(module.num_imported for module in modules.values())
    graph = {name: module.imports for name, module in modules.items()}
    same = repeats(modules)
    readme = (root / "README.md").stat().st_size
    return {
        "core code lines": _row(num_code, "<= 10,300", num_code <= 10_300),
        "file median / p90 / max": _row(_spread(sizes), "max <= 400", max(sizes) <= 400),
        "function median / p90 / max": _row(
            _spread(functions), "p90 <= 25, max <= 60", _p90(functions) <= 25
        ),
        "imports per module": _row(round(per_module, 2), "<= 3.5", per_module <= 3.5),
        "widest importer": _row(f"{widest.name} {len(widest.imports)}", "<= 15", len(widest.imports) <= 15),
        "import circles": _row(len(circles(graph)), "0", not circles(graph)),
        "two-way pairs of packages": _row(len(two_way_pairs(modules)), "0", not two_way_pairs(modules)),
        "keys of a run": _row(num_keys, "<= 88", num_keys <= 88),
        "comments per 100 code lines": _row(round(comments, 1), "6 to 12", 6 <= comments <= 12),
        "places of six repeated lines": _row(len(same), "<= 10", len(same) <= 10),
        "README bytes": _row(readme, "<= 10,000", readme <= 10_000),
    }


def details(root: Path) -> list[str]:
    """Return what to look at: circles, pairs, the widest importers, the largest files, repeated lines."""
    modules = read_modules(root)
    graph = {name: module.imports for name, module in modules.items()}
    lines = [f"circle: {', '.join(group)}" for group in circles(graph)]
    lines += [f"two-way pair: {one} - {two}" for one, two in two_way_pairs(modules)]
    widest = sorted(modules.values(), key=lambda module: -len(module.imports))[:8]
    lines += [f"imports {len(module.imports)}: {module.name}" for module in widest]
    largest = sorted(modules.values(), key=lambda module: -module.num_lines)[:5]
    lines += [f"lines {module.num_lines}: {module.name}" for module in largest]
    return lines + [f"repeated: {line}" for line in repeats(modules)[:20]]


def _row(value: object, goal: str, is_met: bool) -> dict[str, object]:
    return {"value": value, "goal": goal, "met": is_met}


def _p90(values: Sequence[int]) -> int:
    return sorted(values)[int(0.9 * len(values))]


def _spread(values: Sequence[int]) -> str:
    return f"{round(statistics.median(values))} / {_p90(values)} / {max(values)}"


def main(
    checkout: Annotated[Path, typer.Option(help="The repository to measure.")] = Path(__file__).parents[1],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    show: Annotated[bool, typer.Option("--details", help="Also name the places to look at.")] = False,
) -> None:
    """Measure the structure of a checkout."""
    found = measure(checkout)
    if as_json:
        print(json.dumps({"name": "measures", "figures": {}, "goals": found}))
        return
    for name, row in found.items():
        print(f"{name:<30} {row['value']!s:<34} {row['goal']:<22} {'met' if row['met'] else 'MISSED'}")
    for line in details(checkout) if show else []:
        print(line)


if __name__ == "__main__":
    typer.run(main)
