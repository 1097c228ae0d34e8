"""Whole rounds by every method: the state a checkpoint keeps is all that the next round needs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.adapters.folder import load_adapter
from fedllm.config.keys import PRESETS
from fedllm.models.files import resolve_model
from fedllm.plan.run_plan import fixed_keys, resolve
from fedllm.runs.checkpoint import load_checkpoint, save_checkpoint
from fedllm.runs.records import record_to_line
from strategies.publish import publish_adapter
from strategies.rounds import next_round

pytestmark = pytest.mark.usefixtures("own_base_deltas")

METHODS: dict[str, dict[str, Any]] = {
    **{name: {"aggregation.preset": name} for name in PRESETS},
    "svd with momentum": {"aggregation.optimizer": "fedavgm"},
    "svd by nesterov": {"aggregation.optimizer": "nesterov"},
    "rolora by adam": {"aggregation.preset": "rolora", "aggregation.optimizer": "fedadam"},
    "svd clipped": {"aggregation.robust": "norm-clip"},
    "fedex by geometric median": {"aggregation.preset": "fedex", "aggregation.robust": "geometric-median"},
    "ffa by median": {"aggregation.preset": "ffa", "aggregation.robust": "coordinate-median"},
}


# Made of parts that others of these have too.
MADE_OF_OTHERS = ("svd by nesterov", "rolora", "rolora by adam", "ffa by median")


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.soak] * (name in MADE_OF_OTHERS)) for name in METHODS],
)
def test_a_run_that_is_continued_gives_the_bits_of_a_whole_one(
    method: str, make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    config = make_config(METHODS[method])
    run, stopped = open_run(config), open_run(config)
    expected = run.state
    for _ in range(3):
        expected, record = next_round(run.session, expected)
    state = stopped.state
    for _ in range(2):
        state, _ = next_round(stopped.session, state)
    save_checkpoint(tmp_path, state, config.to_flat())
    again = open_run(config)
    state, passed_over = load_checkpoint(tmp_path, fixed_keys(config), again.session.layout)
    assert passed_over == []
    state, resumed = next_round(again.session, state)
    assert state.adapter.digest == expected.adapter.digest
    assert state.base_delta.digest == expected.base_delta.digest
    assert state.norms == expected.norms
    assert torch.equal(state.optimizer.first, expected.optimizer.first)
    assert torch.equal(state.optimizer.second, expected.optimizer.second)
    for line in (record_to_line(record), record_to_line(resumed)):
        numbers = json.loads(line)["aggregation"]
        assert numbers["silenced"] == []
        assert (numbers["rho"] is None) == (method == "fedsa")
    assert bool(expected.base_delta.size) == (method.split()[0] in ("fedex", "flora"))


@pytest.mark.parametrize("preset", ["fedex", "flora", "flexlora", "fedsa"])
def test_every_method_publishes_one_ordinary_adapter(
    preset: str, make_config: Callable, open_run: Callable, tmp_path: Path
) -> None:
    config = make_config({"aggregation.preset": preset})
    run = open_run(config)
    state, _ = next_round(run.session, run.state)
    files = resolve_model(config.model.name)
    folder = publish_adapter(tmp_path, resolve(config), files, state)
    published = load_adapter(folder).state
    expected = adapter_with_base_delta(state.adapter, state.base_delta)
    assert published.digest == expected.digest
    card = (folder / "README.md").read_text()
    assert f"{preset}: read-out `{PRESETS[preset][1]}`" in card
    assert ("adds to the base model too" in card) == (preset in ("fedex", "flora"))
    assert ("keeps a B of its own" in card) == (preset == "fedsa")
    if preset == "fedsa":  # no client's B is at the server
        assert all(int(b_OR.count_nonzero()) == 0 for _, b_OR in published.layout.factors(published.vector))
