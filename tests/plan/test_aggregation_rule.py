"""Which points of the grid can be built, and what the presets stand for."""

import itertools
from collections.abc import Mapping

import pytest

from fedllm.config.key import Scalar
from fedllm.config.keys import PRESETS
from fedllm.config.run_config import KEYS, RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.aggregation import AggregationRule
from fedllm.plan.run_plan import resolve

AXES = [KEYS[f"aggregation.{axis}"].words for axis in ("train", "read-out", "robust")]


def rule_of(axes: Mapping[str, Scalar]) -> AggregationRule:
    flat = {f"aggregation.{name}": value for name, value in axes.items()}
    return resolve(RunConfig.from_flat(flat)).aggregation


def test_every_meaningful_point_of_the_grid_can_be_built() -> None:
    built = []
    for train, read_out, robust in itertools.product(*AXES):
        axes = {"train": train, "read-out": read_out, "robust": robust}
        try:
            built.append(rule_of(axes))
        except ConfigError:
            continue
    grid = {(one.train, one.read_out) for one in built}
    shared = {(train, "factor-mean") for train in ("b", "alternate")}
    assert grid == shared | {("both", read_out) for read_out in KEYS["aggregation.read-out"].words}
    # 5 read-outs x 5 rules on products, local-b alone, and 2 shared factors x 7 rules
    assert len(built) == 5 * 5 + 1 + 2 * 7


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_as_its_axes(name: str) -> None:
    train, read_out, weighting, paper = PRESETS[name]
    axes = {"train": train, "read-out": read_out, **({"weighting": weighting} if weighting else {})}
    assert rule_of({"preset": name}) == rule_of(axes) == rule_of({**axes, "preset": name})
    assert "arXiv 2" in paper


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({"preset": "ffa", "train": "a"}, ["aggregation.train = 'a'", "preset = 'ffa'", "'b'"]),
        ({"preset": "fedit", "read-out": "stack"}, ["aggregation.read-out = 'stack'", "preset = 'fedit'"]),
        ({"preset": "hetlora", "weighting": "tokens"}, ["weighting = 'tokens'", "preset = 'hetlora'"]),
        ({"preset": "fedprox"}, ["aggregation.preset = 'fedprox'", "fedit, ffa"]),
        ({"train": "a", "read-out": "factor-mean"}, ["aggregation.train = 'a'", "'alternate'"]),
    ],
)
def test_a_rule_that_means_nothing_is_refused(axes: dict[str, str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        rule_of(axes)
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


def test_a_preset_leaves_the_weighting_open_where_its_paper_does() -> None:
    assert rule_of({"preset": "fedit", "weighting": "uniform"}).weighting == "uniform"


def test_rolora_trains_b_in_odd_rounds_and_a_in_even_ones() -> None:
    alternate = AggregationRule(train="alternate", read_out="factor-mean")
    assert [alternate.trained_in(number) for number in (1, 2, 3, 4)] == ["b", "a", "b", "a"]
    assert {AggregationRule().trained_in(number) for number in (1, 2)} == {"both"}
