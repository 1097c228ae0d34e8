"""Write the parts of the documentation that the code already says: `python docs/generate.py`.

`docs/config.md` comes from `fedllm/config.py`, the file tree of the README from the first line of every
module. tests/test_docs.py compares both with what is written.
"""

import ast
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # started as a script, only this folder is on the path
    sys.path.insert(0, str(ROOT))

from fedllm import config, limits  # noqa: E402
from fedllm.runs.checkpoint import RESUMABLE_KEYS  # noqa: E402

ROOMS = ("fedllm", "clients", "strategies", "scripts")
FOLDED = {"benchmarks", "experiments"}  # folders that the tree names without their files
BEGIN, END = "<!-- tree: written by docs/generate.py -->\n", "<!-- end of tree -->\n"

# Said before the comment in fedllm/config.py, or in its place where there is none.
NOTES = {
    "seed": "every random draw of a run is a stream derived from it",
    "run.name": "name of the run and of its folder",
    "run.resume": "continue the run of this name after its last complete round",
    "model.quantization": "bits of the frozen weights",
    "model.gradient-checkpointing": "compute activations again in the backward pass: less memory, more time",
    "lora.rank": "rank R of the factors A [R, in] and B [out, R]",
    "lora.alpha": "the product B A is scaled by alpha / rank",
    "lora.init-a": "how A is drawn from the seed: uniform, or rows at right angles (FedSVD under plain SGD)",
    "lora.client-ranks": "ranks of the clients",
    "lora.target-modules": "all-linear = every linear layer but the output head",
    "lora.dropout": "share of the adapters' inputs dropped while training, drawn per row",
    "data.prompt-column": "column of the prompt",
    "data.response-column": "column of the answer; empty = detected",
    "data.text-column": "column of plain text, learnt whole; empty = detected",
    "data.on-bad-row": "leave out a row that cannot be used, or end there",
    "federation.num-clients": "clients the run waits for and deals its source to",
    "federation.num-rounds": "rounds of the run",
    "federation.cohort-fraction": "share of all clients that a round trains, where cohort-size is 0",
    "federation.selection": "whom a round asks: all alike, by their rows, each by its own coin, the worst"
    " known losses of some candidates, or by utility (strategies/selection.py)",
    "federation.min-clients": "updates a round needs",
    "federation.round-deadline": "longest time a round waits for replies",
    "federation.max-failure-rate": "share of a round's clients that may fail; three rounds in a row above it"
    " end the run",
    "train.local-steps": "optimizer steps of a client in a round",
    "train.batch-size": "rows of one step",
    "train.learning-rate": "of AdamW",
    "train.schedule": "the same learning rate in every round, or half a cosine over the rounds",
    "train.weight-decay": "of AdamW",
    "train.clip-norm": "largest norm",
    "train.proximal-space": "pull the factors A and B, or their product, which has one form only",
    "train.max-length": "most",
    "aggregation.train": "the factor that clients train and send",
    "aggregation.read-out": "svd = best rank-R form of the exact mean; factor-mean = mean of A and mean of B;"
    " projection = mean of A and the best B for it; residual = factor-mean, and the base model gains what it"
    " loses; stack = the base model gains the whole mean; local-b = mean of A, every client keeps its own B",
    "aggregation.weighting": "what a client counts: its training rows, its learnt tokens of a round, 1, or"
    " the norm of its product B A",
    "aggregation.robust": "what is left to a client whose update stands out; the last two need"
    " aggregation.train other than both",
    "aggregation.max-malicious": "assumed share",
    "aggregation.optimizer": "what the server does with a round's change",
    "aggregation.server-learning-rate": "of the server optimizer",
    "aggregation.server-momentum": "share of the earlier rounds' direction that is kept",
    "aggregation.second-moment": "share of the earlier rounds' squares that is kept,",
    "privacy.epsilon": "budget",
    "privacy.unit": "what is hidden: one row of a client, or all a client sends",
    "privacy.trust": "who adds the noise: the server or each client",
    "privacy.clip": "C: largest norm",
    "privacy.noise-multiplier": "z:",
    "privacy.metrics": "what leaves a client besides its delta: nothing, held-out losses, or training numbers"
    " too; what leaves is named in privacy.json",
    "personal.mode": "dual = shared and personal adapter add up; ditto = the same, pulled to the shared one",
    "personal.rank": "rank of the personal adapter",
    "distill.when": "in no round, after the last or after every one",
    "distill.teacher": "posterior = the mixture of the clients' models, each weighed by how well it foretold"
    " the text so far; uniform = all alike; logit-mean = FedDF",
    "distill.learning-rate": "of AdamW",
    "distill.gate": "what must improve for a step to be kept: public = the loss on held-out texts; clients ="
    " besides that, the clients' own held-out loss must not worsen; auto = clients where there is no public"
    " text and held-out losses may leave",
    "wire.codec": "4, 2 or 1 + 2/64 bytes a value",
    "wire.node-sum": "one packet up for each node",
    "evaluation.max-new-tokens": "length of an answer at most",
}
_JOINED_BY_SPACE = frozenset(
    {
        "privacy.epsilon",
        "privacy.clip",
        "privacy.noise-multiplier",
        "train.clip-norm",
        "train.max-length",
        "aggregation.max-malicious",
        "aggregation.second-moment",
    }
)
# Notes that stand without the comment.
_WHOLE = frozenset({"federation.max-failure-rate", "train.schedule", "aggregation.robust"})
_TYPE_NAMES = {bool: "bool", int: "int", float: "float", str: "str"}

TOP_LEVEL = {
    "pyproject.toml": "Package, tools, and every configuration key with its default for Flower.",
    "constraints.txt": "The versions the tests ran with.",
    ".ci/run": "What CI runs: scripts/test.sh.",
    "docs/": "A page for each question; docs/index.md lists them.",
    "tests/": "One folder for each room and part; tests/stories/ runs whole federations.",
}


def config_page() -> str:
    """Return docs/config.md."""
    comments = _comments()
    parts = [_CONFIG_HEAD, _section("run-wide", "", [("seed", config.RunConfig().seed)], comments)]
    for item in dataclasses.fields(config.RunConfig):
        value = getattr(config.RunConfig(), item.name)
        if dataclasses.is_dataclass(value):
            keys = [(key, leaf) for key, leaf in _leaves() if key.startswith(f"{item.name}.")]
            parts.append(_section(item.name, (type(value).__doc__ or "").strip(), keys, comments))
    kept = "\n".join(f"- `{key}`" for key, _ in _leaves() if key in RESUMABLE_KEYS)
    return "\n".join([*parts, _CONFIG_TAIL.format(kept=kept)])


def _leaves() -> Iterator[tuple[str, config.Scalar]]:
    yield from config.RunConfig().to_flat().items()


def _section(name: str, intro: str, keys: list[tuple[str, config.Scalar]], comments: dict[str, str]) -> str:
    rows = [f"## {name}\n"]
    rows += [f"{intro}\n"] if intro else []
    rows += ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for key, value in keys:
        default = str(value).lower() if isinstance(value, bool) else str(value)
        shown = f"`{default}`" if default else "empty"
        row = (f"`{key}`", _TYPE_NAMES[type(value)], shown, _allowed(key), _meaning(key, comments))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(rows) + "\n"


def _allowed(key: str) -> str:
    """Return the values a key may take, where the configuration restricts them."""
    if key in limits.CHOICES:
        return ", ".join(choice for choice in limits.CHOICES[key] if choice)
    if key not in limits.RANGES:
        return ""
    low, high, is_open = limits.RANGES[key]
    lowest, highest = _number(low), _number(high)
    if math.isinf(high) or high >= 2**62:
        return f"above {lowest}" if is_open else f"{lowest} or more"
    return f"above {lowest}, at most {highest}" if is_open else f"{lowest} to {highest}"


def _number(value: float) -> str:
    return f"{int(value):,}" if not math.isinf(value) and value == int(value) else f"{value:g}"


def _meaning(key: str, comments: dict[str, str]) -> str:
    """Return the note and the comment of a key; choices that the comment repeats are left out."""
    comment = "" if key in _WHOLE else comments.get(key, "")
    choices = " | ".join(limits.CHOICES.get(key, ()))
    if choices and comment.startswith(choices):
        comment = _unwrapped(comment.removeprefix(choices).lstrip(" :"))
    joint = " " if key in _JOINED_BY_SPACE else "; "
    return joint.join(part for part in (NOTES.get(key, ""), comment) if part)


def _unwrapped(text: str) -> str:
    """Return a text that stands in brackets as a whole without them."""
    inner = text[1:-1]
    return inner if text == f"({inner})" and not set("()") & set(inner) else text


def _comments() -> dict[str, str]:
    """Return the comment at the end of every field's line in fedllm/config.py, by flat key."""
    text = Path(config.__file__).read_text()
    lines = text.splitlines()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    found = {}
    for item in dataclasses.fields(config.RunConfig):
        value = getattr(config.RunConfig(), item.name)
        if not dataclasses.is_dataclass(value):
            continue
        for node in classes[type(value).__name__].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                _, hash_sign, comment = lines[node.lineno - 1][node.end_col_offset or 0 :].partition("#")
                if hash_sign:
                    found[f"{item.name}.{node.target.id.replace('_', '-')}"] = comment.strip()
    return found


def tree() -> str:
    """Return the file tree of the README: every module with its first line, but for those of FOLDED."""
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


def with_tree(readme: str) -> str:
    """Return the text of the README with the tree as it should be."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + tree() + END + rest.partition(END)[2]


_CONFIG_HEAD = """# Configuration keys

Written by `python docs/generate.py` from `fedllm/config.py`, the one home of every default.

A key means the same everywhere it can stand:

| where | how |
|---|---|
| command line | `fedllm run train.local-steps=8` |
| TOML recipe | `[train]` then `local-steps = 8`, or `train.local-steps = 8` |
| Flower | `flwr run . --run-config "train.local-steps=8"` (text needs quotes: `run.name=\\"night\\"`) |
| Python | `RunConfig.from_flat({"train.local-steps": 8})`, read as `config.train.local_steps` |

`fedllm run` and `fedllm check` without a recipe start from `scripts/recipes/quickstart.toml`; a recipe of
your own and Flower start from the defaults below. An unknown key is refused and the nearest known one is
named. A list in a recipe is read as comma-separated text.
"""

_CONFIG_TAIL = """## Keys that may change on resume

They change where, how long or how loudly a run goes, never what a round computes. Every other key must stay
as it was, and a difference is named.

{kept}

With `train.schedule = "cosine"` the number of rounds is fixed too, since the schedule stretches over it.
"""


def main() -> None:
    """Write the generated page and the tree."""
    (ROOT / "docs" / "config.md").write_text(config_page())
    readme = ROOT / "README.md"
    readme.write_text(with_tree(readme.read_text()))


if __name__ == "__main__":
    main()
