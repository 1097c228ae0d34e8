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
run.name run.output run.resume
model.name model.dtype model.device model.quantization model.gradient-checkpointing model.num-threads
lora.rank lora.alpha lora.target-modules lora.init-a lora.client-ranks lora.dropout
data.source data.split data.partition data.columns data.on-bad-row data.held-out-fraction data.max-held-out
data.max-rows
federation.num-clients federation.num-rounds federation.cohort federation.selection federation.over-selection
federation.max-staleness federation.min-clients federation.round-deadline federation.join-deadline
federation.max-retries federation.max-failure-rate
train.local-steps train.batch-size train.learning-rate train.schedule train.weight-decay train.clip-norm
train.proximal train.control-variates train.max-length train.token-budget
aggregation.preset aggregation.train aggregation.read-out aggregation.weighting aggregation.robust
aggregation.optimizer aggregation.server-learning-rate aggregation.staleness-exponent
privacy.epsilon privacy.delta privacy.unit privacy.trust privacy.clip privacy.noise-multiplier
privacy.max-participations privacy.weight-cap privacy.metrics
audit.canaries audit.canary-tokens audit.canary-repeats
personal.mode personal.rank personal.steps
distill.when distill.teacher distill.text distill.num-texts distill.max-tokens distill.steps
distill.batch-size distill.learning-rate distill.top-k distill.pull distill.max-teachers
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
        ("zzz", "`fedllm check` lists every key"),
        ("", "`fedllm check` lists every key"),
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
        ("aggregation.optimizer", ["SVD", "fedavg:momentum=0.1", "fedadam:0.9", "fedadam:"]),
        ("aggregation.server-learning-rate", [0.0]),
        ("aggregation.staleness-exponent", [-0.1]),
        ("privacy.epsilon", [0.0, -1.0, "on"]),
        ("privacy.clip", [0.0, "adaptive:0", "fixed"]),
        ("privacy.noise-multiplier", [0.0]),
        ("privacy.max-participations", [0]),
        ("privacy.weight-cap", [0.0]),
        ("personal.mode", ["ditto:-0.1", "dual:0.1"]),
        ("personal.rank", [0]),
        ("personal.steps", [0]),
        ("distill.teacher", ["posterior:101", "uniform:1"]),
        ("evaluation.every", [0, -1]),
        ("evaluation.max-new-tokens", [-1]),
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


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        (
            {"federation.cohort": 9},
            "federation.cohort = 9 is above federation.num-clients = 8",
        ),
        (
            {"federation.cohort": 1.5},
            "federation.cohort = 1.5: expected a whole number of clients, or a share up to 1",
        ),
        (
            {"federation.selection": "power-of-choice:7.5"},
            "federation.selection = 'power-of-choice:7.5': expected whole candidates",
        ),
        (
            {"aggregation.optimizer": "fedadam:momentum=x"},
            "aggregation.optimizer = 'fedadam:momentum=x': could not convert string to float: 'x'",
        ),
        (
            {"aggregation.optimizer": "fedadam:momentum=1"},
            "aggregation.optimizer: expected momentum and second-moment from 0 to 0.9999 and adaptivity above"
            " 0",
        ),
        ({"federation.min-clients": 9}, "federation.min-clients = 9 is above the cohort of 8"),
        (
            {"federation.cohort": 0.5, "federation.min-clients": 5},
            "federation.min-clients = 5 is above the cohort of 4",
        ),
        (
            {"federation.selection": "poisson", "federation.over-selection": 1.5},
            "federation.over-selection needs a cohort of a fixed size, and federation.selection = 'poisson'"
            " has none: keeping only the first to answer would be another law; set it to 1",
        ),
        (
            {
                "federation.selection": "power-of-choice:7",
                "federation.cohort": 5,
                "federation.over-selection": 1.5,
            },
            "federation.selection = 'power-of-choice:7' names fewer candidates than the 8 clients a round"
            " asks",
        ),
        (
            {"federation.max-staleness": 2, "federation.selection": "poisson"},
            "federation.max-staleness = 2: a poisson round waits for everyone it drew, so none is late;"
            " set it to 0",
        ),
        (
            {"federation.max-staleness": 2},
            "federation.max-staleness = 2 needs aggregation.read-out = 'factor-mean' or 'local-b': any other"
            " turns the factors' basis or changes the base model every round, and a late change was made on"
            " the old one",
        ),
        (
            {"federation.max-staleness": 2, "aggregation.preset": "fedex"},
            "federation.max-staleness = 2 needs aggregation.read-out = 'factor-mean' or 'local-b': any other"
            " turns the factors' basis or changes the base model every round, and a late change was made on"
            " the old one",
        ),
        (
            {"federation.max-staleness": 2, "aggregation.preset": "rolora"},
            "federation.max-staleness = 2: under aggregation.train = 'alternate' a late change of one factor"
            " may come in a round that combines the other; set it to 0",
        ),
        (
            {"federation.max-staleness": 2, "aggregation.preset": "fedit", "wire.node-sum": True},
            "federation.max-staleness = 2: under wire.node-sum a node answers once its last client is done,"
            " so one slow client would make all of its node's late; leave one of them out",
        ),
        (
            {
                "federation.max-staleness": 2,
                "aggregation.read-out": "factor-mean",
                "train.control-variates": True,
            },
            "federation.max-staleness = 2 cannot go with train.control-variates, which assume updates of one"
            " round",
        ),
        (
            {"train.control-variates": True, "train.clip-norm": "off"},
            "train.control-variates needs train.clip-norm above 0: it bounds what one client may add to them",
        ),
        (
            {"train.control-variates": True},
            "train.control-variates needs aggregation.read-out = 'factor-mean': they are gradients of factors"
            " that all share, and any other read-out turns their basis, changes the base model beneath them"
            " or keeps B with the clients",
        ),
        (
            {"train.control-variates": True, "aggregation.preset": "fedsa"},
            "train.control-variates needs aggregation.read-out = 'factor-mean': they are gradients of factors"
            " that all share, and any other read-out turns their basis, changes the base model beneath them"
            " or keeps B with the clients",
        ),
        (
            {"train.control-variates": True, "aggregation.preset": "ffa"},
            "train.control-variates needs aggregation.train = 'both', not 'b': c and every c_i are gradients"
            " of both factors",
        ),
        (
            {
                "train.control-variates": True,
                "aggregation.preset": "hetlora",
                "lora.client-ranks": "4,8",
            },
            "train.control-variates cannot go with lora.client-ranks: no c_i has the columns its client does"
            " not train, so their mean is not the gradient of any loss; leave one of them out",
        ),
        (
            {"train.control-variates": True, "aggregation.preset": "fedit", "wire.node-sum": True},
            "train.control-variates cannot go with wire.node-sum: the change of every client's own would"
            " travel beside the sum that is to replace it; leave one of them out",
        ),
        (
            {
                "train.control-variates": True,
                "aggregation.preset": "fedit",
                "aggregation.robust": "multi-krum",
            },
            "train.control-variates cannot go with aggregation.robust = 'multi-krum': what it leaves out of"
            " the adapter would still enter the control variates; leave one of them out",
        ),
        (
            {"aggregation.train": "a", "aggregation.read-out": "factor-mean"},
            "aggregation.train = 'a': a run starts from B = 0, where the gradient of A is 0 and stays so, and"
            " nothing would ever be learnt; use alternate, which trains both in turn, or b",
        ),
        (
            {"personal.mode": "dual", "aggregation.preset": "fedsa"},
            "personal.mode = 'dual': under aggregation.read-out = 'local-b' every client has a B of its own,"
            " so no adapter is shared that a personal one could go on top of; use none",
        ),
        (
            {"lora.client-ranks": "4,16"},
            "lora.client-ranks = '4,16': expected ranks from 1 to lora.rank = 8, dealt in turn as in 4,8,16,"
            " or for each client once as in anna:4,ben:8",
        ),
        (
            {"aggregation.read-out": "local-b", "aggregation.train": "b"},
            "aggregation.train = 'b': read-out local-b trains both factors and shares A; use both",
        ),
        (
            {"wire.node-sum": True},
            "wire.node-sum = true: aggregation.read-out = 'svd', aggregation.robust = 'none' and"
            " aggregation.weighting = 'examples' need every client's own factors; use factor-mean, no robust"
            " rule and another weighting, or wire.node-sum = false",
        ),
        (
            {"wire.node-sum": True, "aggregation.read-out": "factor-mean", "lora.client-ranks": "4,8"},
            "wire.node-sum = true: clients of different ranks have no common sum; leave lora.client-ranks"
            " empty",
        ),
        ({"run.name": ""}, "run.name = '': expected a plain folder name"),
        ({"run.name": "../x"}, "run.name = '../x': expected a plain folder name"),
        ({"run.name": "a/b"}, "run.name = 'a/b': expected a plain folder name"),
        ({"run.name": ".hidden"}, "run.name = '.hidden': expected a plain folder name"),
    ],
)
def test_values_that_contradict_each_other_are_refused(flat: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig.from_flat(flat))
    assert str(caught.value) == expected


def test_a_number_too_large_for_any_range_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank = 10+: expected a whole number"):
        RunConfig.from_flat({"lora.rank": 10**400})
    assert RunConfig.from_flat({"data.max-rows": 10**400}).data.max_rows == 10**400
