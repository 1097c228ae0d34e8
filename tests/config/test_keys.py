import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config.key import coerce
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve

laws = settings(deadline=None, max_examples=60)
DEFAULTS = RunConfig().to_flat()

# Every key a person can write. A change here is a change of the interface: documentation, recipes and
# [tool.flwr.app.config] follow it.
KEYS = """
seed
run.name run.output run.resume
model.name model.revision model.dtype model.device model.quantization model.gradient-checkpointing
model.num-threads
lora.rank lora.alpha lora.target-modules lora.init-a lora.client-ranks lora.dropout
data.source data.split data.partition data.prompt-column data.response-column data.text-column
data.on-bad-row data.held-out-fraction data.max-held-out data.max-rows
federation.num-clients federation.num-rounds federation.cohort-size federation.cohort-fraction
federation.selection federation.candidates federation.preferred-seconds federation.over-selection
federation.max-staleness federation.min-clients federation.round-deadline federation.join-deadline
federation.max-retries federation.max-failure-rate
train.local-steps train.batch-size train.learning-rate train.schedule train.weight-decay train.clip-norm
train.proximal train.proximal-space train.control-variates train.max-length train.token-budget
aggregation.preset aggregation.train aggregation.read-out aggregation.weighting aggregation.robust
aggregation.max-malicious aggregation.optimizer aggregation.server-learning-rate aggregation.server-momentum
aggregation.second-moment aggregation.adaptivity aggregation.staleness-exponent
privacy.epsilon privacy.delta privacy.unit privacy.trust privacy.clip privacy.adaptive-clip
privacy.noise-multiplier privacy.max-participations privacy.weight-cap privacy.metrics
audit.canaries audit.canary-tokens audit.canary-repeats
personal.mode personal.rank personal.steps personal.pull
distill.when distill.teacher distill.text distill.num-texts distill.max-tokens distill.steps
distill.batch-size distill.learning-rate distill.top-k distill.temper distill.pull distill.max-teachers
distill.originality distill.licence distill.control distill.gate
wire.codec wire.node-sum
evaluation.every evaluation.prompts evaluation.max-new-tokens
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
            "model.revision": st.text(max_size=5),
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
        ("zzz", "`fedllm check` lists every key"),
        ("", "`fedllm check` lists every key"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig.from_flat({key: 1}))
    assert str(caught.value) == f"unknown key {key!r}; {expected}"


@pytest.mark.parametrize(
    ("key", "value", "bounds"),
    [
        ("seed", -1, "at least 0 and at most 9.22337e+18"),
        ("seed", 2**63, "at least 0 and at most 9.22337e+18"),
        ("model.num-threads", 1025, "at least 0 and at most 1024"),
        ("lora.rank", 0, "at least 1 and at most 4096"),
        ("lora.alpha", 0.0, "above 0"),
        ("lora.alpha", math.nan, "finite and above 0"),
        ("lora.alpha", math.inf, "finite and above 0"),
        ("data.held-out-fraction", 0.91, "at least 0 and at most 0.9"),
        ("data.max-held-out", -1, "at least 0"),
        ("data.max-rows", -1, "at least 0"),
        ("federation.num-clients", 0, "at least 1 and at most 1e+06"),
        ("federation.num-rounds", 0, "at least 1 and at most 1e+06"),
        ("federation.cohort-size", -1, "at least 0 and at most 1e+06"),
        ("federation.cohort-fraction", 0.0, "above 0 and at most 1"),
        ("federation.cohort-fraction", 1.01, "above 0 and at most 1"),
        ("federation.candidates", -1, "at least 0 and at most 1e+06"),
        ("federation.preferred-seconds", -0.5, "at least 0"),
        ("federation.max-staleness", -1, "at least 0 and at most 1000"),
        ("federation.over-selection", 0.99, "at least 1 and at most 10"),
        ("federation.min-clients", 0, "at least 1 and at most 1e+06"),
        ("federation.round-deadline", 0.0, "above 0"),
        ("federation.round-deadline", math.inf, "finite and above 0"),
        ("federation.join-deadline", -1.0, "above 0"),
        ("federation.max-retries", 1001, "at least 0 and at most 1000"),
        ("federation.max-failure-rate", -0.1, "at least 0 and at most 1"),
        ("train.local-steps", 0, "at least 1 and at most 1e+06"),
        ("train.batch-size", 0, "at least 1 and at most 1e+06"),
        ("train.learning-rate", -1e-3, "above 0"),
        ("train.learning-rate", math.inf, "finite and above 0"),
        ("train.weight-decay", -0.1, "at least 0"),
        ("train.clip-norm", -1.0, "at least 0"),
        ("train.proximal", -0.1, "at least 0"),
        ("train.max-length", 7, "at least 8 and at most 1e+07"),
        ("aggregation.staleness-exponent", -0.1, "at least 0 and at most 100"),
        ("personal.rank", 0, "at least 1 and at most 4096"),
        ("personal.steps", 0, "at least 1 and at most 1e+06"),
        ("personal.pull", -0.1, "at least 0"),
        ("evaluation.every", -1, "at least 0 and at most 1e+06"),
        ("evaluation.max-new-tokens", -1, "at least 0 and at most 100000"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(key: str, value: Any, bounds: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig.from_flat({key: value}))
    assert str(caught.value) == f"{key} = {value!r}: expected a value {bounds}"


@pytest.mark.parametrize(
    "key",
    [
        "model.dtype",
        "model.quantization",
        "data.on-bad-row",
        "federation.selection",
        "train.schedule",
        "lora.init-a",
        "train.proximal-space",
        "personal.mode",
        "aggregation.read-out",
        "aggregation.weighting",
        "aggregation.optimizer",
        "wire.codec",
    ],
)
def test_a_value_outside_its_choices_is_named_with_all_of_them(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = 'SVD': expected one of (\w|-|, )+$") as caught:
        resolve(RunConfig.from_flat({key: "SVD"}))
    choices = str(caught.value).rpartition("one of ")[2].split(", ")
    assert DEFAULTS[key] in choices
    for choice in choices:
        assert RunConfig.from_flat({key: choice}).to_flat()[key] == choice


@laws
@given(st.integers(-(10**400), 10**400))
def test_whole_numbers_are_read_from_their_text(number: int) -> None:
    assert coerce("k", number, 0) == number
    assert coerce("k", f" {number} ", 0) == number
    if abs(number) < 10**300:
        as_float = coerce("k", number, 0.0)
        assert as_float == float(number)
        assert type(as_float) is float


@laws
@given(st.floats(allow_nan=False))
def test_numbers_are_read_from_their_text(number: float) -> None:
    assert coerce("k", number, 0.0) == number
    assert coerce("k", str(number), 0.0) == number


@laws
@given(st.text())
def test_texts_are_taken_as_they_are_and_numbers_only_from_numerals(text: str) -> None:
    assert coerce("k", text, "") == text
    for like in (0, 0.0, False):
        try:
            value = coerce("k", text, like)
        except ConfigError:
            continue
        assert type(value) is type(like)


@pytest.mark.parametrize(
    ("value", "like", "expected"),
    [
        ("true", False, True),
        ("FALSE", True, False),
        (True, False, True),
        (["q_proj", "v_proj"], "", "q_proj,v_proj"),
        ([], "", ""),
        (3, 0.5, 3.0),
        ("1e-3", 0.5, 0.001),
    ],
)
def test_what_toml_and_a_command_line_give_is_taken(value: Any, like: Any, expected: Any) -> None:
    found = coerce("k", value, like)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "like", "expected"),
    [
        (1, False, "true or false"),
        ("yes", False, "true or false"),
        ("", False, "true or false"),
        (1.0, 0, "a whole number"),
        ("1.0", 0, "a whole number"),
        (True, 0, "a whole number"),
        ("", 0, "a whole number"),
        ("one", 0.5, "a number"),
        (True, 0.5, "a number"),
        (None, 0.5, "a number"),
        ([1.0], 0.5, "a number"),
        pytest.param(10**400, 0.5, "a number", id="beyond any float"),
        (1, "", "text"),
        (None, "", "text"),
        ([1], "", "text"),
        ({"a": 1}, "", "text"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_expected(value: Any, like: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        coerce("some.key", value, like)
    assert str(caught.value) == f"some.key = {value!r}: expected {expected}"


def test_a_number_too_large_for_any_range_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank = 10+: expected a value"):
        resolve(RunConfig.from_flat({"lora.rank": 10**400}))
    assert RunConfig.from_flat({"data.max-rows": 10**400}).data.max_rows == 10**400
