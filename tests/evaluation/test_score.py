"""Tasks under several adapters at once: chance, intervals, differences, outcomes, as JSON too."""

import json
from collections.abc import Callable

from fedllm.evaluation.score import measure, score
from fedllm.evaluation.task import Task
from tests.evaluation.conftest import adapters_of


def test_adapters_are_compared_with_the_first(make_engine: Callable, quiz: Task) -> None:
    engine = make_engine()
    base, tuned = adapters_of(engine, 2)
    (result,) = score(engine, {"base": base, "tuned": tuned, "same": base}, [quiz])
    found = json.loads(json.dumps(result.to_dict()))
    assert found["chance"] == sum(1 / len(item.choices) for item in quiz.items) / 6
    assert (found["kind"], found["items"], found["best_constant"]) == ("choice", 6, 0.5)
    first, same = found["adapters"]["base"], found["adapters"]["same"]
    assert first["differences"] == {}
    assert same["differences"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (len(first["outcomes"]), first["outcomes"]) == (6, same["outcomes"])
    assert set(found["adapters"]["tuned"]["figures"]) == {"accuracy", "accuracy-normalised"}


def test_flowertunes_rule_is_a_figure_of_its_own(make_engine: Callable, quiz: Task) -> None:
    engine = make_engine()
    (base,) = adapters_of(engine, 1)
    found = measure(engine, {"base": base}, quiz, with_flowertune=True)
    assert list(found["base"].figures) == ["accuracy", "accuracy-normalised", "flowertune-rule"]
