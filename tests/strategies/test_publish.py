"""What a run's card and result say of held-out losses: the same data holders under base and adapter."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from clients.client_app import app
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.config.run_config import RunConfig
from fedllm.models.base import describe_layout
from fedllm.models.files import resolve_model
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from scripts.runtimes.local import local_grid
from strategies.card import model_card
from strategies.publish import MOST_LETTERS, keep_answers, summary
from strategies.run import run_federation

BASE = {"anna": 4.0, "ben": 8.0}


@pytest.fixture
def end(make_config: Callable) -> Callable[..., tuple[str, Mapping[str, Any]]]:
    """Return a function (losses by round, adapter of the last record) -> the card, what the result says."""

    def do(losses: Mapping[int, Mapping[str, float]], adapter: str = "") -> tuple[str, Mapping[str, Any]]:
        config: RunConfig = make_config()
        state = ServerState(2, initial_adapter(describe_layout(config.model, config.lora), 0))
        digests = {0: "of the base", 1: "of round 1", 2: adapter or state.adapter.digest}
        records = tuple(
            RoundRecord(round_num=number, held_out=losses.get(number, {}), adapter=digest)
            for number, digest in digests.items()
        )
        state = ServerState(2, state.adapter, records=records)
        result = summary(state, Path("adapter"))
        files = resolve_model(config.model.name)
        return model_card(resolve(config), files, state, {}), result["held_out"]  # type: ignore[return-value]

    return do


def test_losses_are_compared_on_clients_that_measured_both(end: Callable) -> None:
    card, held_out = end({0: BASE, 2: {"ben": 6.0, "cleo": 1.0}})
    assert "| mean of 1 of 3 data holders | 8.0000 | 6.0000 |" in card
    assert held_out["before"]["clients"] == {"ben": 8.0}
    assert held_out["after"]["clients"] == {"ben": 6.0}
    assert (held_out["before"]["mean"], held_out["after"]["mean"]) == (8.0, 6.0)


@pytest.mark.parametrize(
    ("losses", "adapter"),
    [
        ({0: BASE, 1: BASE}, ""),  # the last round was not measured
        ({1: BASE, 2: BASE}, ""),  # nor the base model
        ({0: BASE, 2: BASE}, "another"),  # the last losses are not those of the published adapter
        ({0: BASE, 2: {"cleo": 1.0}}, ""),  # nobody measured both
        ({}, ""),
    ],
)
def test_what_was_not_measured_is_not_compared(
    losses: Mapping[int, Mapping[str, float]], adapter: str, end: Callable
) -> None:
    card, held_out = end(losses, adapter)
    assert "Not measured." in card
    assert held_out == {}


@pytest.fixture
def finished(make_config: Callable, tmp_path: Path) -> Path:
    """Return the folder of a run of five data holders, four of whom never train."""
    source = tmp_path / "rows.jsonl"
    names = ("anna", "ben", "cleo", "dora", "emil")
    rows = [{"text": f"Return line {n}.", "client": name} for name in names for n in range(5)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data.source": str(source),
        "federation.num-clients": 5,
        "federation.cohort": 1,
        "federation.min-clients": 1,
        "federation.num-rounds": 1,
        "run.output": str(tmp_path),
        "run.name": "part",
    }
    config = make_config(changes)
    run_federation(config, local_grid(config, app))
    return tmp_path / "part"


def test_numbers_on_the_card_agree(finished: Path) -> None:
    card = (finished / "adapter" / "README.md").read_text()
    assert "trained by 1 of 5 data holders" in card
    assert "Of 5 data holders that were planned 5 joined; 1 of them trained" in card
    assert set(re.findall(r"(\d+) (?:of \d+ )?data holders", card)) == {"1", "5"}
    assert "| mean of 5 data holders |" in card


def test_answers_are_kept_in_result_and_card(finished: Path) -> None:
    before = load_adapter(finished / "adapter").state.digest
    answers = {"prompts": ["# 질문", "b" * 9000], "before": ["```x\ny", ""], "after": ["<b>", "c " * 9000]}
    for _ in range(2):  # a resumed run keeps them again
        keep_answers(finished, answers)
    kept = json.loads((finished / "result.json").read_text())
    assert kept["status"] == "completed"
    assert kept["answers"]["prompts"][0] == "# 질문"
    assert max(len(text) for texts in kept["answers"].values() for text in texts) <= MOST_LETTERS
    card = (finished / "adapter" / "README.md").read_text()
    assert card.count("Answers before and after") == 1
    # Indented, so that no answer becomes part of the page's own form.
    assert "\n    prompt: # 질문\n    before: ```x y\n    after:  <b>\n" in card
    assert max(map(len, card.partition("## Answers")[2].splitlines())) < 500
    assert load_adapter(finished / "adapter").state.digest == before  # and its manifest still fits
