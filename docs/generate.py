"""Write what the code already says into other files: `python docs/generate.py`.

`docs/config.md` and the Flower keys of pyproject.toml come from `fedllm/config/keys.py`, the file tree of
docs/architecture.md from the first line of every module. Tests compare them with what is written.
"""

import ast
import sys
from itertools import groupby
from pathlib import Path

import tomli_w

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # started as a script, only this folder is on the path
    sys.path.insert(0, str(ROOT))

from fedllm.config.run_config import KEYS, RESUMABLE_KEYS, RunConfig  # noqa: E402

ROOMS = ("fedllm", "clients", "strategies", "scripts")
FOLDED = {"benchmarks", "experiments"}  # folders that the tree names without their files
BEGIN, END = "<!-- tree: written by docs/generate.py -->\n", "<!-- end of tree -->\n"
FLOWER_KEYS = "[tool.flwr.app.config]\n"  # Flower takes an override only of a key that stands there

TOP_LEVEL = {
    "pyproject.toml": "Package, tools, and every configuration key with its default for Flower.",
    "constraints.txt": "The versions the tests ran with.",
    ".ci/run": "What CI runs: scripts/test.sh.",
    "docs/": "A page for each question; docs/index.md lists them.",
    "tests/": "One folder for each room and part; tests/stories/ runs whole federations.",
}


def config_page() -> str:
    """Return docs/config.md."""
    parts = [_CONFIG_HEAD]
    for section, keys in groupby(KEYS.values(), key=lambda key: key.name.rpartition(".")[0]):
        intro = type(getattr(RunConfig(), section)).__doc__ if section else "Of the run as a whole."
        rows = [
            f"## {section or 'seed'}\n\n{intro}\n",
            "| key | default | values | meaning |",
            "|---|---|---|---|",
        ]
        for key in keys:
            default = str(key.default).lower() if isinstance(key.default, bool) else str(key.default)
            cells = (f"`{key.name}`", f"`{default}`" if default else "empty", key.allowed, key.meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows) + "\n")
    kept = "\n".join(f"- `{name}`" for name in KEYS if name in RESUMABLE_KEYS)
    return "\n".join([*parts, _CONFIG_TAIL.format(kept=kept)])


def with_flower_keys(pyproject: str) -> str:
    """Return the text of pyproject.toml with every key and its default as its last section."""
    defaults = (tomli_w.dumps({"value": key.default}).replace("value", key.name, 1) for key in KEYS.values())
    return pyproject.partition(FLOWER_KEYS)[0] + FLOWER_KEYS + "".join(defaults)


def tree() -> str:
    """Return the file tree: every module with its first line, but for those of FOLDED."""
    lines = []
    for room in ROOMS:
        lines += _folder_lines(ROOT / room, 0)
    lines += [_tree_line(name, text, 0) for name, text in TOP_LEVEL.items()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def _folder_lines(folder: Path, depth: int) -> list[str]:
    lines = [_tree_line(f"{folder.name}/", first_line(folder / "__init__.py"), depth)]
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in entries:
        if path.is_dir() and any(path.rglob("*.py")):
            whole = _folder_lines(path, depth + 1)
            lines += whole[:1] if path.name in FOLDED else whole
        elif path.is_dir() and path.name == "recipes":
            lines.append(
                _tree_line("recipes/", "Recipes that `fedllm run` finds by their bare name.", depth + 1)
            )
            lines += [_tree_line(file.name, first_line(file), depth + 2) for file in sorted(path.iterdir())]
        elif path.suffix in {".py", ".sh"} and path.name != "__init__.py":
            lines.append(_tree_line(path.name, first_line(path), depth + 1))
    return lines


def _tree_line(name: str, text: str, depth: int) -> str:
    return f"{'  ' * depth + name:<26} {text}".rstrip()


def first_line(file: Path) -> str:
    """Return the first sentence or line of a module's docstring, or of the comment that opens a file."""
    text = file.read_text()
    if file.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    else:
        lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and line[1:2] != "!"]
    first = lines[0] if lines else ""
    sentence, stop, _ = first.partition(". ")
    return sentence + "." if stop else first


def with_tree(page: str) -> str:
    """Return the text of docs/architecture.md with the tree as it should be."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + tree() + END + rest.partition(END)[2]


_CONFIG_HEAD = """# Configuration keys

Written by `python docs/generate.py` from `fedllm/config/keys.py`, the one home of every default.

A key means the same everywhere it can stand:

| where | how |
|---|---|
| command line | `fedllm run train.local-steps=8` |
| TOML recipe | `[train]` then `local-steps = 8`, or `train.local-steps = 8` |
| YAML recipe | `train:` then `  local-steps: 8`, or `train.local-steps: 8` |
| Flower | `flwr run . --run-config "train.local-steps=8"` (text needs quotes: `run.name=\\"night\\"`) |
| Python | `RunConfig.from_flat({"train.local-steps": 8})`, read as `config.train.local_steps` |

`fedllm run` and `fedllm check` without a recipe start from `scripts/recipes/quickstart.toml`; a recipe of
your own and Flower start from the defaults below. An unknown key is refused and the nearest known one is
named. A list in a recipe is read as text parted by commas, a list of prompts by `||`.

Some values are a number or a word, such as `auto`. A word may take a number after a colon: where the table
says `oort[:SECONDS]`, both `oort` and `oort:30` are values. Constants of a server optimizer have names:
`aggregation.optimizer=fedadam:learning-rate=0.01,momentum=0.9,second-moment=0.99,adaptivity=1e-4`.
"""

_CONFIG_TAIL = """## Keys that may change on resume

They change where, how long or how loudly a run goes, never what a round computes. Every other key must stay
as it was, and a difference is named.

{kept}

With `train.schedule = "cosine"` the number of rounds is fixed too, since the schedule stretches over it.
"""


def main() -> None:
    """Write the generated page, the Flower keys and the tree."""
    (ROOT / "docs" / "config.md").write_text(config_page())
    for path, rewritten in (("pyproject.toml", with_flower_keys), ("docs/architecture.md", with_tree)):
        file = ROOT / path
        file.write_text(rewritten(file.read_text()))


if __name__ == "__main__":
    main()
