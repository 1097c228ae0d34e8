"""Which combinations are refused, and why; what the presets stand for."""

import itertools
from typing import Any

import pytest

from fedllm.config.keys import PRESETS
from fedllm.config.run_config import KEYS, RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.aggregation import AggregationRule, ServerOptimizer, aggregation_rule
from fedllm.plan.run_plan import resolve

AXES = [KEYS[f"aggregation.{axis}"].words for axis in ("train", "read-out", "robust")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"robust": "coordinate-median"}, "B G and G\\^-1 A are the same adapter"),
        ({"robust": "trimmed-mean", "read_out": "factor-mean"}, "B G and G\\^-1 A are the same adapter"),
        ({"read_out": "residual", "base_bits": 4}, "4-bit weights cannot hold the sum; use svd"),
        ({"read_out": "stack", "base_bits": 8}, "8-bit weights cannot hold the sum; use svd"),
        ({"train": "b", "read_out": "residual"}, "already exact; use factor-mean"),
        ({"train": "b", "read_out": "stack"}, "already exact; use factor-mean"),
        ({"train": "alternate", "read_out": "svd"}, "already exact; use factor-mean"),
        ({"train": "a", "read_out": "projection"}, "already exact; use factor-mean"),
        ({"train": "b", "read_out": "local-b"}, "trains both factors and shares A; use both"),
        ({"read_out": "stack", "optimizer": ServerOptimizer(name="fedavgm")}, "no momentum can follow"),
        ({"read_out": "residual", "optimizer": ServerOptimizer(name="nesterov")}, "no momentum can follow"),
        (
            {"read_out": "residual", "optimizer": ServerOptimizer(learning_rate=0.5)},
            "server learning rate 0.5",
        ),
        ({"read_out": "factor-mean", "mixed_ranks": True}, "or aggregation.preset = hetlora"),
        (
            {"train": "b", "read_out": "factor-mean", "robust": "trimmed-mean", "mixed_ranks": True},
            "do not share all coordinates",
        ),
        ({"read_out": "local-b", "robust": "multi-krum"}, "never shows the server a product"),
        ({"read_out": "local-b", "weighting": "product-norm"}, "never shows the server a product"),
        ({"robust": "norm-clip", "weighting": "product-norm"}, "which .* exists to prevent"),
    ],
)
def test_a_combination_that_would_be_false_is_refused_with_the_reason(
    fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        AggregationRule(**fields)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("aggregation.")


def test_every_other_combination_of_the_axes_can_be_built() -> None:
    built = []
    for train, read_out, robust in itertools.product(*AXES):
        try:
            built.append(AggregationRule(train=train, read_out=read_out, robust=robust))
        except ConfigError:
            continue
    grid = {(one.train, one.read_out) for one in built}
    shared = {(train, "factor-mean") for train in ("a", "b", "alternate")}
    assert grid == shared | {("both", read_out) for read_out in KEYS["aggregation.read-out"].words}
    # 5 read-outs x 5 rules on products, local-b alone, and 3 shared factors x 7 rules
    assert len(built) == 5 * 5 + 1 + 3 * 7


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_as_its_axes(name: str) -> None:
    train, read_out, weighting, paper = PRESETS[name]
    axes = {"aggregation.train": train, "aggregation.read-out": read_out}
    if weighting:
        axes["aggregation.weighting"] = weighting
    expected = aggregation_rule(RunConfig.from_flat(axes))
    assert aggregation_rule(RunConfig.from_flat({"aggregation.preset": name})) == expected
    assert aggregation_rule(RunConfig.from_flat({**axes, "aggregation.preset": name})) == expected
    assert "arXiv 2" in paper


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"preset": "ffa", "train": "a"}, "aggregation.train = 'a' contradicts .* 'ffa', which is 'b'"),
        ({"preset": "fedit", "read-out": "stack"}, "which is 'factor-mean'; leave one of them out"),
        ({"preset": "hetlora", "weighting": "tokens"}, "which is 'product-norm'; leave one of them out"),
        ({"preset": "fedprox"}, "aggregation.preset = 'fedprox': expected one of fedit, ffa"),
        ({"preset": "fedex", "optimizer": "fedadam"}, "no momentum can follow"),
    ],
)
def test_a_preset_and_an_axis_that_disagree_are_refused(axes: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        resolve(RunConfig.from_flat({f"aggregation.{name}": value for name, value in axes.items()}))
    assert "\n" not in str(caught.value)


def test_a_preset_leaves_the_weighting_open_where_its_paper_does() -> None:
    config = RunConfig.from_flat({"aggregation.preset": "fedit", "aggregation.weighting": "uniform"})
    assert aggregation_rule(config).weighting == "uniform"


def test_a_quantized_base_is_known_to_the_rule() -> None:
    flat = {"model.quantization": "4bit", "aggregation.preset": "fedex"}
    with pytest.raises(ConfigError, match="4-bit weights cannot hold the sum"):
        resolve(RunConfig.from_flat(flat))
    RunConfig.from_flat({**flat, "aggregation.preset": "flexlora"})


def test_rolora_trains_b_in_odd_rounds_and_a_in_even_ones() -> None:
    alternate = AggregationRule(train="alternate", read_out="factor-mean")
    assert [alternate.trained_in(number) for number in (1, 2, 3, 4)] == ["b", "a", "b", "a"]
    assert {AggregationRule().trained_in(number) for number in (1, 2)} == {"both"}
