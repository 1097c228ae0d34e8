"""A recipe for rows that were looked at: each value with the reason for it."""

import math
from dataclasses import dataclass

import tomli_w

from fedllm.config.key import Scalar
from scripts.data_survey import LIMITS, Column, Survey

_MOST_CUT, _MOST_LOST = 0.05, 0.01  # shares of rows that a suggested length may cut, and cost their answer
_FEWEST_ROWS = 8  # of a client in the mean: one to measure, the rest to train on
_ALL_TOGETHER = 10  # clients that a round asks all of
_PASSES, _MOST_ROUNDS = 3, 20  # over all rows in the whole run, as far as so many rounds get


@dataclass(frozen=True)
class Choice:
    """A key with a value and, where it follows from the rows, the reason."""

    key: str
    value: Scalar
    why: str = ""


_FEWEST_AT_HOME = 40  # rows of a client in the mean, with which training on alone can gain
_AT_HOME = (
    Choice("personal.mode", "finetune", "afterwards each client trains on at home, as long as that helps it"),
    Choice("personal.steps", 40, "at most"),
)


def choose(found: Survey, source: str, model: str, name: str) -> list[Choice]:
    """Return the keys of a recipe for these rows."""
    limit = next((each for each in LIMITS if _fits(found, each)), LIMITS[-1])
    owner = found.owners[0] if found.owners else None
    clients = _num_clients(owner, found.num_rows)
    cohort = min(clients, _ALL_TOGETHER)
    rows = found.num_rows / clients
    batch, steps = (8 if rows >= 100 else 4), (10 if rows >= 40 else 4)
    drawn = cohort * batch * steps  # rows of a round
    rounds = min(_MOST_ROUNDS, max(3, math.ceil(_PASSES * found.num_rows / drawn)))
    passes = f"{rounds * drawn / found.num_rows:.1f} passes over the rows"
    return [
        Choice("run.name", name),
        Choice("model.name", model),
        Choice("data.source", source),
        *([Choice("data.columns", found.columns_key, "a guess")] if found.columns_key else []),
        _partition(owner, clients),
        Choice("federation.num-clients", clients),
        *([Choice("federation.cohort", cohort, "clients of a round")] if cohort < clients else []),
        Choice("federation.num-rounds", rounds, passes),
        Choice("train.local-steps", steps),
        Choice("train.batch-size", batch),
        Choice("train.learning-rate", 1e-3),
        Choice("train.max-length", limit, told_of_limit(found, limit)),
        *(_AT_HOME if rows >= _FEWEST_AT_HOME else []),
    ]


def told_of_limit(found: Survey, limit: int) -> str:
    """Return what train.max-length = `limit` does to the rows."""
    cut, lost = found.lengths.cut(limit), found.lengths.lost(limit)
    return f"{1 - cut:.0%} of the rows whole, {cut:.0%} cut, {lost:.0%} without their answer"


def as_toml(choices: list[Choice], heading: list[str]) -> str:
    """Return the recipe as text: a table for each section, the reasons as comments."""
    lines = [f"# {' '.join(line.split())}" for line in heading]  # a file's name may hold a line's end
    section = ""
    for choice in choices:
        table, _, leaf = choice.key.rpartition(".")
        if table != section:
            section = table
            lines += ["", f"[{table}]"]
        set_to = tomli_w.dumps({leaf: choice.value}).rstrip()
        lines.append(f"{set_to}  # {choice.why}" if choice.why else set_to)
    return "\n".join([*lines, "", *_MORE]) + "\n"


_MORE = (
    "# Public prompts answered before and after, parted by ||:",
    "# [evaluation]",
    '# prompts = "..."',
    "",
    "# Differential privacy for every row (docs/privacy.md; pip install 'fedllm[dp]'):",
    "# [privacy]",
    "# epsilon = 8",
)


def _fits(found: Survey, limit: int) -> bool:
    return found.lengths.cut(limit) <= _MOST_CUT and found.lengths.lost(limit) <= _MOST_LOST


def _num_clients(owner: Column | None, num_rows: int) -> int:
    if owner is None:
        return max(1, min(8, num_rows // _FEWEST_ROWS))
    enough = sum(size >= _FEWEST_ROWS for size in owner.sizes)
    return enough if enough > 1 else len(owner.sizes)  # where all have few rows, nobody is left out


def _partition(owner: Column | None, clients: int) -> Choice:
    if owner is None:
        return Choice("data.partition", "iid", "no column names an owner: dealt at random, for a trial")
    few = len(owner.sizes) - clients
    left = f"; {few} more with fewer than {_FEWEST_ROWS} rows are left out" if few else ""
    rows = f"{owner.sizes[clients - 1]:,} to {owner.sizes[0]:,} rows each"
    return Choice("data.partition", f"column:{owner.name}", f"{clients} values, {rows}{left}")
