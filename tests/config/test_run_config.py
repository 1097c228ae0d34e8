import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config.run_config import KEYS as DECLARED
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve

laws = settings(deadline=None, max_examples=60)
DEFAULTS = RunConfig().to_flat()

# Every key a person can write. A change here is a change of the interface: documentation, recipes and
# [tool.flwr.app.config] follow it.
KEYS = """
seed
run.name run.output run.resume run.purpose
model.name model.dtype model.device model.quantization model.gradient-checkpointing model.num-threads
lora.rank lora.alpha lora.target-modules lora.init-a lora.client-ranks lora.dropout
data.source data.split data.partition data.columns data.on-bad-row data.held-out-fraction data.max-held-out
data.max-rows data.licences
federation.num-clients federation.num-rounds federation.cohort federation.selection federation.over-selection
federation.max-staleness federation.min-clients federation.round-deadline federation.join-deadline
federation.sites federation.max-retries federation.max-failure-rate
train.local-steps train.batch-size train.learning-rate train.schedule train.weight-decay train.clip-norm
train.proximal train.control-variates train.max-length train.token-budget
aggregation.preset aggregation.train aggregation.read-out aggregation.weighting aggregation.robust
aggregation.optimizer
privacy.epsilon privacy.delta privacy.unit privacy.trust privacy.clip privacy.noise-multiplier
privacy.max-participations privacy.weight-cap privacy.metrics
audit.canaries
personal.mode personal.steps
distill.when distill.teacher distill.text distill.num-texts distill.max-tokens distill.steps
distill.batch-size distill.learning-rate distill.top-k distill.max-teachers
distill.originality distill.licence distill.control distill.gate
secure.method secure.min-parties
wire.codec wire.node-sum
evaluation.every evaluation.prompts evaluation.max-new-tokens
track.to
"""


def test_the_keys_are_these_and_no_others() -> None:
    assert list(DEFAULTS) == KEYS.split()


def test_every_default_is_a_scalar_that_flower_admits() -> None:
    assert {type(value) for value in DEFAULTS.values()} <= {bool, int, float, str}


@laws
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "run.resume": st.booleans(),
            "data.columns": st.text(max_size=5),
            "train.clip-norm": st.floats(0.1, 9) | st.just("off"),
            "federation.cohort": st.integers(1, 9) | st.floats(0.1, 1) | st.just("all"),
            "lora.rank": st.integers(1, 64),
            "lora.alpha": st.floats(0.01, 100),
            "federation.num-clients": st.integers(1, 100),
            "train.learning-rate": st.floats(1e-8, 1),
            "train.schedule": st.sampled_from(["constant", "cosine"]),
            "wire.codec": st.sampled_from(["fp32", "bf16", "int8"]),
        },
    )
)
def test_a_config_survives_its_flat_form(flat: dict[str, Any]) -> None:
    config = RunConfig.from_flat(flat)
    assert {key: config.to_flat()[key] for key in flat} == flat
    assert RunConfig.from_flat(config.to_flat()) == config
    assert config.override({}) == config
    assert RunConfig().override(flat) == config


def test_a_config_is_a_frozen_value() -> None:
    config = RunConfig.from_flat({"lora.rank": 4})
    assert hash(config) == hash(RunConfig.from_flat({"lora.rank": "4"}))
    with pytest.raises(FrozenInstanceError):
        config.lora.rank = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("rank", "did you mean 'lora.rank'?"),
        ("lora.rnk", "did you mean 'lora.rank'?"),
        ("train.local_steps", "did you mean 'train.local-steps'?"),
        ("learning-rate", "did you mean 'train.learning-rate'?"),
        ("federation.rounds", "did you mean 'federation.num-rounds'?"),
        ("Seed", "did you mean 'seed'?"),
        ("federation.candidates", "did you mean 'federation.selection'?"),
        ("data.text-column", "did you mean 'data.columns'?"),
        ("personal.pull", "did you mean 'personal.mode'?"),
        ("aggregation.max-malicious", "did you mean 'aggregation.robust'?"),
        ("aggregation.second-moment", "did you mean 'aggregation.optimizer'?"),
        ("model.revision", "did you mean 'model.name'?"),
        ("zzz", "`fedllm config` lists every key"),
        ("", "`fedllm config` lists every key"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig.from_flat({key: 1}))
    assert str(caught.value) == f"unknown key {key!r}; {expected}"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("seed", -1, "a whole number from 0 up to 9,223,372,036,854,775,807"),
        ("seed", 2**63, "a whole number from 0 up to 9,223,372,036,854,775,807"),
        ("model.num-threads", 0, "a whole number from 1 up to 1,024, or auto"),
        ("model.num-threads", "off", "a whole number from 1 up to 1,024, or auto"),
        ("lora.alpha", 0.0, "a number above 0"),
        ("lora.alpha", math.nan, "a number above 0"),
        ("lora.alpha", math.inf, "a number above 0"),
        ("federation.cohort", 0, "a number above 0 up to 1,000,000, or all"),
        ("train.proximal", "product", "a number from 0, or product:MU"),
        ("train.schedule", "SVD", "one of constant, cosine"),
        (
            "personal.mode",
            "dual:4",
            "one of none, finetune[:NUMBER], dual[:rank=R], ditto[:rank=R,pull=MU]; NUMBER above 0",
        ),
        ("track.to", "tb", "any of tensorboard, mlflow, wandb, trackio, parted by commas"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat({key: value})
    assert str(caught.value) == f"{key} = {value!r}: expected {allowed}"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model.num-threads", [1025, 2.5, "1.0"]),
        ("lora.rank", [0, 4097, 1.0, "", "auto"]),
        ("data.held-out-fraction", [0.91, -0.1]),
        ("data.max-held-out", [-1]),
        ("data.max-rows", [0, -1, "ALL"]),
        ("federation.num-clients", [0, 1_000_001]),
        ("federation.num-rounds", [0]),
        ("federation.cohort", [-1, -0.5, math.inf, "half"]),
        ("federation.selection", ["SVD", "power-of-choice:0", "power-of-choice:x", "oort:", "uniform:2"]),
        ("federation.max-staleness", [-1]),
        ("federation.over-selection", [0.99]),
        ("federation.min-clients", [0]),
        ("federation.round-deadline", [0.0, math.inf]),
        ("federation.join-deadline", [-1.0]),
        ("federation.max-retries", [1001]),
        ("federation.max-failure-rate", [-0.1]),
        ("train.local-steps", [0]),
        ("train.batch-size", [0]),
        ("train.learning-rate", [-1e-3, math.inf]),
        ("train.weight-decay", [-0.1]),
        ("train.clip-norm", [0.0, -1.0, "auto"]),
        ("train.proximal", [-0.1, "product:-1", "product:nan", "factor:1"]),
        ("train.max-length", [7]),
        ("train.token-budget", [0]),
        ("aggregation.robust", ["SVD", "multi-krum:0.6", "trimmed-mean:-0.1", "norm-clip:0.1"]),
        ("aggregation.optimizer", ["SVD", "fedadam:0.9", "fedadam:"]),
        ("privacy.epsilon", [0.0, -1.0, "on"]),
        ("privacy.clip", [0.0, "adaptive:0", "fixed"]),
        ("privacy.noise-multiplier", [0.0]),
        ("privacy.max-participations", [0]),
        ("privacy.weight-cap", [0.0]),
        ("personal.mode", ["ditto:0.1", "dual:0.1", "finetune:0", "finetune:fast"]),
        ("personal.steps", [0]),
        ("distill.teacher", ["posterior:101", "uniform:1"]),
        ("evaluation.every", [0, -1]),
        ("evaluation.max-new-tokens", [-1]),
        ("track.to", ["tensorboard,wandbs", ",", "TensorBoard"]),
    ],
)
def test_a_key_takes_no_value_that_means_nothing(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_flat({key: value})
        assert str(caught.value) == f"{key} = {value!r}: expected {DECLARED[key].allowed}"


@pytest.mark.parametrize("key", [name for name, key in DECLARED.items() if key.words])
def test_every_word_of_a_key_is_a_value(key: str) -> None:
    for word, ending in DECLARED[key].words.items():
        values = [] if ending.startswith(":") else [word]
        values += [f"{word}:0.25"] * ("=" not in ending and bool(ending))
        for value in values:
            assert RunConfig.from_flat({key: value}).to_flat()[key] == value


def test_a_number_too_large_for_any_range_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank = 10+: expected a whole number"):
        RunConfig.from_flat({"lora.rank": 10**400})
    assert RunConfig.from_flat({"data.max-rows": 10**400}).data.max_rows == 10**400
