import json
from collections.abc import Mapping

import pytest

from fedllm.config.run_config import RunConfig
from scripts.studies.cells import Done, Study
from scripts.studies.findings import findings, study_tables
from scripts.studies.summary import Summary, study_json
from scripts.studies.trials import Outcome, Trial

METHODS = ("base", "alone", "centralised", "federated", "home")


def outcome(
    method: str, seed: int, losses: Mapping[str, float], rate: float = 0.01, **more: object
) -> Outcome:
    figures = {
        **{"clients": losses, "last": losses, "others": losses, "choosing": 1.0},
        **{"tokens": 100, "steps": 4, "bytes_up": 2_000_000 * (method in ("federated", "home"))},
        **more,
    }
    return Outcome(
        Trial("s", "any", {"method": method, "seed": seed, "rate": rate}, {}), figures, seconds=2.0
    )


@pytest.fixture(scope="module")
def result() -> Summary:
    """A study of two seeds and two clients, one of which gains by joining."""
    losses = {
        "base": {"a": 4.0, "b": 4.0},
        "alone": {"a": 3.0, "b": 2.0},
        "centralised": {"a": 2.0, "b": 2.0},
        "federated": {"a": 3.5, "b": 2.5},
        "home": {"a": 2.5, "b": 2.1},
    }
    outcomes = [
        outcome(method, seed, {name: loss + seed / 5 for name, loss in of_method.items()})
        for seed in (0, 1)
        for method, of_method in losses.items()
    ]
    study = Study("two", RunConfig(), METHODS, (0.01, 0.1), (0, 1))
    lost = Outcome(outcomes[0].trial, {}, "failed: too few updates")
    return study_json(study, Done((*outcomes, lost), (lost,), {}))


def test_a_study_says_who_gained_over_training_alone(result: Summary) -> None:
    home = result["summary"]["home"]
    assert home["gained_over_alone"] == 0.5
    assert home["at_equal_tokens"] == {"mean": pytest.approx(2.4), "gained_over_alone": 0.5}
    assert result["summary"]["federated"]["gained_over_alone"] == 0.0
    assert result["summary"]["alone"]["gained_over_alone"] is None


def test_means_and_deviations_are_over_seeds(result: Summary) -> None:
    home = result["summary"]["home"]
    assert home["mean"] == pytest.approx(2.4)
    assert home["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert home["worst"] == {"client": "a", "loss": pytest.approx(2.6)}
    assert home["clients"] == {"a": pytest.approx(2.6), "b": pytest.approx(2.2)}


def test_the_gap_is_from_base_to_centralised(result: Summary) -> None:
    gap = result["summary"]["home"]["gap_closed"]
    assert gap["value"] == pytest.approx((4.0 - 2.3) / 2.0)
    assert gap["low"] == pytest.approx(0.75)  # a alone
    assert gap["high"] == pytest.approx(0.95)  # b alone
    assert result["summary"]["base"]["gap_closed"] is None


def test_numbers_that_are_not_finite_are_null() -> None:
    infinite = {"a": float("inf")}
    wild = outcome("alone", 0, {"a": 1.0}, last=infinite, others=infinite, epsilon=3.0)
    found = study_json(Study("s", RunConfig(), ("alone",), (0.01,), (0,)), Done((wild,), (wild,), {}))
    assert json.loads(json.dumps(found, allow_nan=False))["cells"][0]["at_equal_tokens"] == {"a": None}
    assert found["summary"]["alone"]["at_equal_tokens"]["mean"] is None
    assert found["summary"]["alone"]["epsilon"] == 3.0
    assert findings(found) == []  # nothing to compare with


def test_sentences_name_whom_joining_did_not_help(result: Summary) -> None:
    told = " ".join(findings(result))
    assert "gives 1 of 2 clients a lower loss" in told
    assert "Not to b (+0.100)." in told
    assert "closes 85% of the way from the base model (75% to 95%" in told
    assert "At an edge of --rates" in told
    assert told.count("base with seed 0 at rate 0.01: failed: too few updates") == 1


def test_tables_have_a_line_for_each_method(result: Summary) -> None:
    losses, costs = study_tables(result)
    assert losses.row_count == costs.row_count == len(METHODS)
