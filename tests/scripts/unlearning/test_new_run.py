"""Class D: a new run without the client, that says it is approximate, next to the old one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clients.client_app import app
from clients.process import PROCESS
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve
from fedllm.runs.folder import read_left_out, run_folder, write_left_out
from fedllm.runs.lineage import adapter_digest, noted_clients, statement_of_run
from fedllm.runs.unlearning import read_unlearning
from scripts.runtimes.local import local_grid
from scripts.unlearning.approximate import refusal_of
from scripts.unlearning.new_run import unlearn_approximately
from strategies.run import run_federation
from strategies.unlearning.guarantee import guarantee_of


def run(config: RunConfig, without: tuple[str, ...] = ()) -> Path:
    """Do a run and return its folder."""
    folder = run_folder(config)
    if without:
        folder.mkdir(parents=True)
        write_left_out(folder, without)
    run_federation(config, local_grid(config, app), resident=PROCESS.resident)
    return folder


def products(adapter: AdapterState) -> list[torch.Tensor]:
    return [b @ a for a, b in adapter.layout.factors(adapter.vector)]


def test_an_unlearnt_run_has_lost_the_client_and_says_how(make_config: Callable) -> None:
    before = run(make_config())
    for method in ("ascent", "subtraction"):
        after = unlearn_approximately(before, "ben", method, f"by-{method}", "updates came late")
        told = read_unlearning(after)
        assert told is not None
        assert (told.kind, told.method, told.reason) == ("D", method, "updates came late")
        assert told.guarantee in (after / "adapter" / "README.md").read_text()
        statement = statement_of_run(after)  # what a signature covers
        assert statement.unlearning is not None
        assert statement.unlearning["guarantee"] == told.guarantee
        parent = {"relation": "unlearned-from", "digest": adapter_digest(before / "adapter")}
        assert parent in statement.parents
        assert read_left_out(after) == {"ben"}
        assert "ben" in noted_clients(after)  # a withdrawal still marks what is made of it
        losses = json.loads((after / "result.json").read_text())["held_out"]["after"]["clients"]
        assert set(losses) == {"anna", "cleo", "dora"}
        assert load_adapter(after / "adapter").state.digest != load_adapter(before / "adapter").state.digest
    with pytest.raises(ConfigError, match="'zoe'"):
        unlearn_approximately(before, "zoe", "ascent", "third")


def test_a_call_that_was_killed_can_be_made_again(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(make_config())
    with monkeypatch.context() as killed:
        killed.setattr("scripts.unlearning.new_run.publish_run", _raise)
        with pytest.raises(KeyboardInterrupt):
            unlearn_approximately(before, "ben", "ascent", "after")
    after = unlearn_approximately(before, "ben", "ascent", "after")
    assert json.loads((after / "result.json").read_text())["status"] == "completed"
    with pytest.raises(ConfigError, match="choose another run"):
        unlearn_approximately(before, "ben", "ascent", "after")
    with pytest.raises(ConfigError, match="unlearn from the run before it"):
        guarantee_of(after, "anna")


def _raise(*_: object) -> None:
    raise KeyboardInterrupt


def test_one_round_is_subtracted_exactly(make_config: Callable) -> None:
    once = {"federation.num-rounds": 1, "aggregation.preset": "ffa"}
    before = run(make_config(overrides=once))
    without = run(make_config(overrides={**once, "run.name": "never"}), without=("ben",))
    after = unlearn_approximately(before, "ben", "subtraction", "after")
    pairs = zip(*(products(load_adapter(one / "adapter").state) for one in (after, without)), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("keys", "method", "said"),
    [
        ({"privacy.epsilon": 8.0, "privacy.delta": 1e-3}, "ascent", "privacy budget"),
        ({"secure.method": "masks"}, "subtraction", "secure.method"),
        ({"aggregation.preset": "fedsa"}, "ascent", "local-b"),
        ({"aggregation.preset": "flora"}, "ascent", "use subtraction"),
        ({"aggregation.optimizer": "fedadam"}, "subtraction", "use ascent"),
        ({"personal.mode": "dual"}, "subtraction", "use ascent"),
    ],
)
def test_what_cannot_be_unlearnt_so_is_refused(
    keys: dict, method: str, said: str, make_config: Callable
) -> None:
    assert said in refusal_of(resolve(make_config(overrides=keys)), method)
    assert refusal_of(resolve(make_config()), method) == ""
