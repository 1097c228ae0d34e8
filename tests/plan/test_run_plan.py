"""What follows from a configuration as a whole."""

from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import RunPlan, resolve


def planned(**keys: Any) -> RunPlan:
    """Return the plan of keys such as `train__batch_size` for train.batch-size."""
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return resolve(RunConfig.from_flat(flat))


def test_the_digest_is_that_of_the_keys_a_round_computes_from() -> None:
    base = planned().digest
    assert len(base) == 64
    assert planned(run__name="other", model__device="cpu", federation__num_rounds=9).digest == base
    assert planned(train__batch_size=5).digest != base
    assert planned(seed=1).digest != base


@pytest.mark.parametrize("keys", [{"train__schedule": "cosine"}, {"privacy__epsilon": 8.0}])
def test_the_digest_has_the_number_of_rounds_where_it_counts(keys: dict[str, Any]) -> None:
    assert planned(**keys).digest != planned(**keys, federation__num_rounds=9).digest


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "a/b",
        "a\\b",
        ".hidden",
        "-r",
        " x",
        "x ",
        "a\x1b[31m",
        "a\nb",
        "a\u202eb",
        "x" * 201,
        "가" * 67,
    ],
)
def test_a_name_that_makes_no_plain_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name") as caught:
        planned(run__name=name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["run", "2026", "병원 연합-1", "a.b_c", "x" * 200])
def test_a_name_in_any_script_is_taken(name: str) -> None:
    assert planned(run__name=name).config.run.name == name


def test_an_own_copy_of_the_model_keeps_the_digest() -> None:
    plan = planned(model__name="org/model@main")
    own = plan.with_own_model("somewhere/model")
    assert own.digest == plan.digest
    assert own.config.model.name == "somewhere/model"


def test_evaluation_comes_as_often_as_asked_and_at_the_end() -> None:
    plan = planned(federation__num_rounds=5)
    assert [number for number in range(1, 6) if plan.is_evaluated(number)] == [5]
    plan = planned(federation__num_rounds=5, evaluation__every=2)
    assert [number for number in range(1, 6) if plan.is_evaluated(number)] == [2, 4, 5]


def test_ranks_are_dealt_by_the_plan() -> None:
    plan = planned(lora__client_ranks="4,8")
    assert plan.ranks(["b", "a", "c"]) == {"a": 4, "b": 8, "c": 4}


@pytest.mark.parametrize(
    ("flat", "names"),
    [
        ({"federation.cohort": 9}, ["federation.cohort = 9", "federation.num-clients = 8"]),
        ({"federation.cohort": 1.5}, ["federation.cohort = 1.5"]),
        ({"federation.selection": "power-of-choice:7.5"}, ["federation.selection = 'power-of-choice:7.5'"]),
        ({"aggregation.optimizer": "fedadam:momentum=x"}, ["aggregation.optimizer = 'fedadam:momentum=x'"]),
        ({"aggregation.optimizer": "fedadam:momentum=1"}, ["aggregation.optimizer"]),
        ({"aggregation.optimizer": "fedavgm:adaptivity=1e-3"}, ["'fedavgm:adaptivity=1e-3'", "momentum"]),
        ({"aggregation.optimizer": "fedadagrad:second-moment=0.5"}, ["second-moment=0.5'", "adaptivity"]),
        ({"aggregation.optimizer": "fedadam:beta=0.5"}, ["'fedadam:beta=0.5'", "momentum"]),
        ({"federation.min-clients": 9}, ["federation.min-clients = 9", "cohort of 8"]),
        (
            {"federation.cohort": 0.5, "federation.min-clients": 5},
            ["federation.min-clients = 5", "cohort of 4"],
        ),
        (
            {
                "federation.selection": "power-of-choice:7",
                "federation.cohort": 5,
                "federation.over-selection": 1.5,
            },
            ["federation.selection = 'power-of-choice:7'", "the 8 clients"],
        ),
        ({"lora.client-ranks": "4,16"}, ["lora.client-ranks = '4,16'", "lora.rank = 8"]),
        (
            {"audit.canaries": 1, "train.max-length": 15},
            ["audit.canaries = 1", "train.max-length = 15"],
        ),
        ({"run.name": ""}, ["run.name = ''"]),
        ({"run.name": "../x"}, ["run.name = '../x'"]),
        ({"run.name": "a/b"}, ["run.name = 'a/b'"]),
        ({"run.name": ".hidden"}, ["run.name = '.hidden'"]),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(flat: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig.from_flat(flat))
    assert all(name in str(caught.value) for name in names)
