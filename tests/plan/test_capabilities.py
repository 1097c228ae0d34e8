"""Settings that cannot go together are refused, with both keys named and what to set instead."""

import re
from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan import capabilities
from fedllm.plan.capabilities import ANY, INSTEAD, SETTINGS, Part, Setting, refuse_conflicts
from fedllm.plan.run_plan import resolve
from tests.plan.refusals import CENTRAL, COINS, DISTIL, GOLDEN, LOCAL, SHARES, golden_text, refusal

EXAMPLE = {"privacy.epsilon": 8.0}
MEAN = {"aggregation.preset": "fedit"}
SCAFFOLD = {"train.control-variates": True, **MEAN}
LATE = {"federation.max-staleness": 2}
MEAN_OF_SUMS = {"wire.node-sum": True, "aggregation.read-out": "factor-mean"}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"aggregation.robust": "coordinate-median"}, "aggregation.robust", "aggregation.train"),
    ({"aggregation.robust": "trimmed-mean", **MEAN}, "aggregation.robust", "aggregation.train"),
    ({"model.quantization": "4bit", "aggregation.read-out": "residual"}, "model.q", "aggregation.read-out"),
    ({"model.quantization": "8bit", "aggregation.preset": "flora"}, "model.q", "aggregation.preset"),
    ({"aggregation.train": "b", "aggregation.read-out": "stack"}, "aggregation.train", "aggregation.read"),
    ({"aggregation.train": "alternate"}, "aggregation.train", "aggregation.read-out"),
    ({"aggregation.train": "b", "aggregation.read-out": "local-b"}, "aggregation.train", "aggregation.read"),
    ({"aggregation.preset": "flora", "aggregation.optimizer": "fedavgm"}, "'stack'", "'fedavgm'"),
    ({"aggregation.preset": "fedex", "aggregation.optimizer": "fedadam"}, "'fedex'", "'fedadam'"),
    ({"aggregation.preset": "fedex", "aggregation.optimizer": "fedavg:learning-rate=2"}, "'fedex'", "rate=2"),
    ({"lora.client-ranks": "4,8", **MEAN}, "lora.client-ranks", "aggregation.preset = 'fedit'"),
    ({"lora.client-ranks": "4,8", "aggregation.read-out": "factor-mean"}, "client-ranks", "aggregation.read"),
    ({"lora.client-ranks": "4,8", "aggregation.preset": "ffa", "aggregation.robust": "trimmed-mean"},
     "lora.client-ranks", "aggregation.robust"),
    ({"aggregation.preset": "fedsa", "aggregation.robust": "multi-krum"}, "'local-b'", "'multi-krum'"),
    ({"aggregation.read-out": "local-b", "aggregation.weighting": "product-norm"}, "'local-b'", "'product-"),
    ({"aggregation.robust": "norm-clip", "aggregation.weighting": "product-norm"}, "'norm-clip'", "'produc"),
    ({"wire.node-sum": True}, "wire.node-sum = true", "aggregation.read-out = 'svd'"),
    ({**MEAN_OF_SUMS, "aggregation.robust": "multi-krum"}, "wire.node-sum", "aggregation.robust"),
    ({**MEAN_OF_SUMS, "aggregation.weighting": "product-norm"}, "wire.node-sum", "aggregation.weighting"),
    ({**MEAN_OF_SUMS, "aggregation.train": "b", "lora.client-ranks": "4,8"}, "wire.node-sum", "lora.client-"),
    ({"federation.selection": "poisson", "federation.over-selection": 1.5}, "selection", "over-selection"),
    ({**SHARES, "secure.method": "none"}, "privacy.trust = 'distributed'", "secure.method = 'none'"),
    ({**SHARES, "wire.node-sum": True}, "privacy.trust = 'distributed'", "wire.node-sum = true"),
    ({**SHARES, "privacy.clip": "adaptive"}, "privacy.clip = 'adaptive'", "privacy.trust = 'distributed'"),
    ({**SHARES, "aggregation.preset": "ffa"}, "aggregation.weighting", "privacy.weight-cap"),
    ({**LATE, "federation.selection": "poisson"}, "federation.max-staleness", "federation.selection"),
    (LATE, "federation.max-staleness", "aggregation.read-out"),
    ({**LATE, "aggregation.preset": "fedex"}, "federation.max-staleness", "aggregation.read-out"),
    ({**LATE, "aggregation.preset": "rolora"}, "federation.max-staleness", "aggregation.train"),
    ({**LATE, **MEAN_OF_SUMS}, "federation.max-staleness", "wire.node-sum"),
    ({**LATE, **SCAFFOLD}, "federation.max-staleness", "train.control-variates"),
    ({**SCAFFOLD, "train.clip-norm": "off"}, "train.control-variates", "train.clip-norm"),
    ({"train.control-variates": True}, "train.control-variates", "aggregation.read-out"),
    ({"train.control-variates": True, "aggregation.preset": "fedsa"}, "train.control-v", "aggregation.read"),
    ({"train.control-variates": True, "aggregation.preset": "ffa"}, "train.control-variates", "'ffa'"),
    ({"train.control-variates": True, "aggregation.preset": "hetlora", "lora.client-ranks": "4,8"},
     "train.control-variates", "lora.client-ranks"),
    ({**SCAFFOLD, "wire.node-sum": True}, "train.control-variates", "wire.node-sum"),
    ({**SCAFFOLD, "aggregation.robust": "multi-krum"}, "train.control-variates", "aggregation.robust"),
    ({"personal.mode": "dual", "aggregation.preset": "fedsa"}, "personal.mode", "aggregation.read-out"),
    ({"personal.mode": "finetune", "aggregation.preset": "fedsa"}, "personal.mode", "aggregation.read-out"),
    ({"personal.mode": "finetune", "data.max-held-out": 0}, "personal.mode", "data.max-held-out"),
    ({"privacy.noise-multiplier": 1.0}, "privacy.noise-multiplier", "privacy.epsilon"),
    ({"privacy.clip": "adaptive"}, "privacy.clip", "privacy.epsilon"),
    ({**EXAMPLE, "privacy.trust": "central"}, "privacy.trust", "privacy.unit"),
    ({**CENTRAL, **MEAN}, "aggregation.weighting = 'examples'", "privacy.weight-cap"),
    ({**CENTRAL, "aggregation.preset": "fedex"}, "aggregation.read-out", "privacy.trust = 'central'"),
    ({**CENTRAL, "aggregation.preset": "ffa", "aggregation.weighting": "uniform",
      "aggregation.robust": "multi-krum"}, "aggregation.robust", "privacy.trust"),
    ({**CENTRAL, "aggregation.weighting": "tokens"}, "aggregation.weighting", "privacy.epsilon"),
    ({**CENTRAL, "wire.node-sum": True}, "wire.node-sum", "privacy.trust"),
    ({**CENTRAL, "lora.client-ranks": "4,8"}, "lora.client-ranks", "privacy.trust"),
    ({**CENTRAL, "federation.selection": "weighted"}, "federation.selection", "privacy.trust"),
    ({**CENTRAL, "federation.selection": "oort:30"}, "federation.selection", "privacy.epsilon"),
    ({**EXAMPLE, "federation.selection": "power-of-choice"}, "federation.selection", "privacy.epsilon"),
    ({**CENTRAL, "federation.over-selection": 1.5}, "federation.over-selection", "privacy.unit"),
    ({**LOCAL, "federation.over-selection": 1.5}, "federation.over-selection", "privacy.unit"),
    ({**EXAMPLE, **LATE}, "federation.max-staleness", "privacy.epsilon"),
    ({**EXAMPLE, **SCAFFOLD}, "train.control-variates", "privacy.epsilon"),
    ({**EXAMPLE, "aggregation.preset": "fedsa"}, "aggregation.read-out", "privacy.epsilon"),
    ({**COINS, "federation.min-clients": 2}, "federation.min-clients", "federation.selection"),
    ({**COINS, "privacy.max-participations": 2}, "privacy.max-participations", "federation.selection"),
    ({**LOCAL, "privacy.clip": "adaptive"}, "privacy.clip", "privacy.trust = 'local'"),
    ({**EXAMPLE, "privacy.clip": "adaptive"}, "privacy.clip", "privacy.unit = 'example'"),
    ({**LOCAL, "privacy.weight-cap": 10.0}, "privacy.weight-cap", "privacy.trust"),
    ({**CENTRAL, "privacy.weight-cap": 9.0, "aggregation.weighting": "uniform"}, "weight-cap", "weighting"),
    ({**CENTRAL, **DISTIL}, "distill.when", "privacy.trust"),
    ({**LOCAL, **DISTIL, "distill.gate": "clients"}, "distill.gate", "privacy.metrics = 'withheld'"),
    ({**LOCAL, **DISTIL, "distill.originality": "on"}, "distill.originality", "privacy.epsilon"),
    ({**DISTIL, **MEAN_OF_SUMS}, "distill.when", "wire.node-sum"),
    ({**DISTIL, "aggregation.preset": "fedsa"}, "distill.when", "aggregation.preset = 'fedsa'"),
    ({**DISTIL, "distill.gate": "clients", "data.held-out-fraction": 0.0}, "distill.gate", "data.held-out-f"),
    ({**DISTIL, "distill.gate": "clients", "data.max-held-out": 0}, "distill.gate", "data.max-held-out"),
]  # fmt: skip


@pytest.mark.parametrize(("flat", "one", "other"), REFUSED)
def test_a_conflict_names_both_keys(flat: dict[str, Any], one: str, other: str) -> None:
    sentence = refusal(flat)
    assert one in sentence
    assert other in sentence
    assert "\n" not in sentence


def test_the_sentences_and_refused_pairs_are_those_of_the_file() -> None:
    assert golden_text() == GOLDEN.read_text(), "run `python -m tests.plan.refusals` and read the difference"


CHANGE = re.compile(r"([a-z.-]+) = ('[^']*'|[^\s,]+)")


@pytest.mark.parametrize("flat", [flat for flat, *_ in REFUSED])
def test_a_cure_lifts_the_conflict(flat: dict[str, Any]) -> None:
    sentence = refusal(flat)
    for cure in sentence.rpartition("; ")[2].split(", or "):
        changes = {key: value.strip("'") for key, value in CHANGE.findall(cure)}
        left_out = cure.removeprefix("leave ").removesuffix(" out")
        left = refusal({key: value for key, value in {**flat, **changes}.items() if key != left_out})
        assert not left or left.partition(": ")[0] != sentence.partition(": ")[0]
        assert "contradicts" not in left


def test_every_setting_is_one_that_a_run_can_have() -> None:
    for key, settings in SETTINGS.items():
        values = [*settings, *(setting.instead for setting in settings.values()), INSTEAD.get(key)]
        for value in values:
            if value not in (None, ANY):
                RunConfig.from_flat({key: value})


def test_what_one_setting_needs_another_one_hides() -> None:
    settings = [setting for by_value in SETTINGS.values() for setting in by_value.values()]
    needed = {need for setting in settings for need in setting.needs}
    assert needed - {capabilities.OUR_MEAN} == {need for setting in settings for need in setting.hides}


def test_the_sentence_is_made_of_the_pair() -> None:
    sums = Part("x.sum = true", Setting("a node sends one sum", hides=["every update"]), "set x.sum = false")
    median = Part("x.rule = 'median'", Setting("it compares", needs=["every update"]), "set x.rule = 'mean'")
    with pytest.raises(ConfigError) as caught:
        refuse_conflicts([sums, median])
    assert str(caught.value) == (
        "x.rule = 'median' cannot go with x.sum = true: it compares, which needs every update, while a node"
        " sends one sum; set x.sum = false, or set x.rule = 'mean'"
    )
    refuse_conflicts([sums, sums])


def test_keys_in_use_are_those_with_an_effect() -> None:
    in_use = resolve(RunConfig.from_flat({"privacy.epsilon": 8.0})).in_use()
    assert (in_use["aggregation.train"], in_use["aggregation.read-out"]) == ("b", "factor-mean")
    assert (in_use["privacy.trust"], in_use["privacy.metrics"]) == ("local", "held-out")
    assert in_use["lora.init-a"] == "orthonormal"
    assert "distill.gate" not in in_use
    assert "privacy.trust" not in resolve(RunConfig()).in_use()
