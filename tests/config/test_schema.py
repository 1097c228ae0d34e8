from typing import Any

import pytest

from fedllm.config.key import Scalar
from fedllm.config.recipe import flatten
from fedllm.config.run_config import KEYS, RunConfig
from fedllm.config.schema import recipe_schema

jsonschema = pytest.importorskip("jsonschema")
CHECK = jsonschema.Draft202012Validator(recipe_schema())


def test_the_schema_is_one_and_takes_every_default() -> None:
    CHECK.check_schema(recipe_schema())
    assert CHECK.is_valid(RunConfig().to_flat())


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("lora.rank", [1, 4096]),
        ("train.clip-norm", ["off", 0.5]),
        ("federation.cohort", ["all", 5, 0.1]),
        ("federation.selection", ["uniform", "oort", "oort:30"]),
        ("train.proximal", [0, "product:0.1"]),
        ("lora.target-modules", ["all-linear", ["q_proj", "v_proj"]]),
        ("aggregation.preset", ["", "ffa"]),
        ("run.resume", [True, False]),
        ("track.to", ["", "mlflow", "tensorboard,mlflow", ["wandb", "trackio"]]),
    ],
)
def test_the_schema_takes_what_the_key_takes(key: str, values: list[Scalar]) -> None:
    for value in values:
        RunConfig.from_flat({key: value})
        assert CHECK.is_valid({key: value}), value
        section, _, leaf = key.partition(".")
        assert CHECK.is_valid({section: {leaf: value}}), value


@pytest.mark.parametrize(
    "recipe",
    [
        {"lora.rank": 0},
        {"lora.rank": 4097},
        {"lora": {"rnk": 4}},
        {"lora": 4},
        {"rank": 4},
        {"train.learning-rate": 0},
        {"train.learning-rate": "fast"},
        {"aggregation.read-out": "mean"},
        {"federation.selection": "best"},
        {"run.resume": "maybe"},
        {"track.to": "mlflow,paper"},
    ],
)
def test_the_schema_refuses_what_the_key_refuses(recipe: dict[str, Any]) -> None:
    assert not CHECK.is_valid(recipe)
    with pytest.raises(ValueError, match=r".+"):
        RunConfig.from_flat(flatten(recipe))


def test_the_schema_says_what_each_key_means() -> None:
    told = recipe_schema()["$defs"]
    assert {name: told[name]["default"] for name in KEYS} == RunConfig().to_flat()
    assert all(KEYS[name].meaning in told[name]["description"] for name in KEYS)
