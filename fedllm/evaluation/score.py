"""What adapters give on tasks: every figure with its interval, and how far it is from the first adapter's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fedllm.engine.engine import Engine
from fedllm.evaluation import flowertune
from fedllm.evaluation.intervals import Estimate, difference, estimate
from fedllm.evaluation.likelihood import measure_choices, measure_texts
from fedllm.evaluation.numbers import MAX_NEW_TOKENS, measure_numbers
from fedllm.evaluation.task import Scores, Task


@dataclass(frozen=True)
class AdapterResult:
    """One adapter on one task. `differences` are to the first adapter, {} for itself.

    `outcomes` has the task's first figure by item: 1 or 0 for right or wrong, or the nats of a text.
    """

    figures: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    outcomes: tuple[float, ...]
    generations: tuple[str, ...]


@dataclass(frozen=True)
class TaskResult:
    """All adapters on one task, by name; the first is what the others are compared with."""

    task: Task
    adapters: Mapping[str, AdapterResult]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        task = self.task
        return {
            "kind": task.kind,
            "items": len(task.items),
            "chance": task.chance,
            "best_constant": task.best_constant,
            "adapters": {name: asdict(result) for name, result in self.adapters.items()},
        }


def score(engine: Engine, adapters: Mapping[str, torch.Tensor], tasks: Sequence[Task]) -> list[TaskResult]:
    """Return what adapters [P] of the engine's layout give on each task; no adapter is a vector of zeros."""
    return [compare(task, measure(engine, adapters, task)) for task in tasks]


def measure(
    engine: Engine,
    adapters: Mapping[str, torch.Tensor],
    task: Task,
    *,
    with_flowertune: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Scores]:
    """Return the scores of each adapter [P] on a task.

    `with_flowertune` adds FlowerTune's rule to tasks of choices.
    """
    vectors = list(adapters.values())
    if task.kind == "number":
        found = measure_numbers(engine, vectors, task, max_new_tokens)
    else:
        found = (measure_choices if task.kind == "choice" else measure_texts)(engine, vectors, task)
    if with_flowertune and task.kind == "choice":
        letters = flowertune.measure_first_letter(engine, vectors, task)
        found = [
            replace(scores, figures={**scores.figures, flowertune.FIGURE: letter})
            for scores, letter in zip(found, letters, strict=True)
        ]
    return dict(zip(adapters, found, strict=True))


def compare(task: Task, scores: Mapping[str, Scores]) -> TaskResult:
    """Return figures with intervals, and differences to the first of the adapters."""
    first = next(iter(scores))
    found = {}
    for name, mine in scores.items():
        figures = {figure: estimate(ratio) for figure, ratio in mine.figures.items()}
        others = {} if name == first else scores[first].figures
        differences = {figure: difference(mine.figures[figure], others[figure]) for figure in others}
        outcomes = tuple(next(iter(mine.figures.values())).tops)
        found[name] = AdapterResult(figures, differences, outcomes, mine.generations)
    return TaskResult(task, found)
