"""The truth table of the gates: each alone decides, and what was not measured is not passed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import ConfigError
from fedllm.identity import public_text
from fedllm.runs.lineage import note_clients
from fedllm.withdrawal import sign_withdrawal
from scripts.pipeline.gates import GateFigures, Limits, gate_figures, judge, passed, told

BEFORE = {"anna": 4.0, "ben": 3.0, "cem": 3.5}
BETTER = {"anna": 3.8, "ben": 2.7, "cem": 3.3}
FIGURES = GateFigures(
    before=BEFORE,
    after=BETTER,
    epsilon=2.0,
    memorisation={
        **{"extraction": 0.03, "extraction_held_out": 0.01, "extraction_base": 0.02},
        **{"near_duplicates": 0.2, "near_duplicates_held_out": 0.2, "near_duplicates_base": 0.1},
    },
)
LIMITS = Limits(epsilon=8.0, extraction=0.02, near_duplicates=0.0)
ALL = ["epsilon", "extraction", "held-out", "near_duplicates", "signature", "withdrawn", "worst-client"]


def failed(
    figures: GateFigures, limits: Limits = LIMITS, *, spent: float = 1.0, signed: bool = True
) -> list[str]:
    """Return the names of the gates that were not passed."""
    gates = judge(figures, limits, spent=spent, is_signed=signed)
    assert sorted(gates) == ALL
    assert passed(gates) is all(gate["passed"] for gate in gates.values())
    assert bool(told(gates)) is not passed(gates)
    return sorted(name for name, gate in gates.items() if not gate["passed"])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"after": BEFORE}, ["held-out"]),
        ({"after": {**BETTER, "anna": 4.01}}, ["worst-client"]),  # gain 0.163, standard error 0.091
        ({"epsilon": None}, ["epsilon"]),
        ({"epsilon": 7.01}, ["epsilon"]),
        ({"memorisation": {}}, ["extraction", "near_duplicates"]),
        ({"memorisation": {**FIGURES.memorisation, "extraction": 0.05}}, ["extraction"]),
        ({"memorisation": {**FIGURES.memorisation, "near_duplicates": 0.21}}, ["near_duplicates"]),
        ({"withdrawn": 1}, ["withdrawn"]),
        ({"before": {}}, ["held-out", "worst-client"]),
        ({"before": {"anna": 4.0}}, ["held-out", "worst-client"]),
        ({"after": {**BETTER, "ben": float("nan")}}, ["held-out", "worst-client"]),
    ],
)
def test_each_figure_decides_its_gate_alone(changes: dict[str, Any], names: list[str]) -> None:
    assert failed(replace(FIGURES, **changes)) == names


def test_a_gain_within_its_standard_error_may_be_chance() -> None:
    gains = (0.3, 0.0, -0.1)  # mean 0.067, standard error 0.120
    after = {client: loss - gain for (client, loss), gain in zip(BEFORE.items(), gains, strict=True)}
    assert failed(replace(FIGURES, after=after)) == ["held-out"]
    after = {client: loss - gain - 0.06 for (client, loss), gain in zip(BEFORE.items(), gains, strict=True)}
    assert failed(replace(FIGURES, after=after)) == [], "mean 0.127"


def test_only_clients_that_have_both_losses_count() -> None:
    figures = replace(FIGURES, before={**BEFORE, "gone": 9.0}, after={**BETTER, "new": 9.0})
    assert failed(figures) == []


def test_the_worst_client_may_rise_as_far_as_is_allowed() -> None:
    after = {"anna": 4.1, "ben": 2.5, "cem": 3.0}
    assert failed(replace(FIGURES, after=after)) == ["worst-client"]
    assert failed(replace(FIGURES, after=after), replace(LIMITS, worst_rise=0.11)) == []


def test_epsilon_of_all_runs_adds_up() -> None:
    assert failed(FIGURES, spent=6.0) == []
    assert failed(FIGURES, spent=6.01) == ["epsilon"]


def test_an_altered_start_passes_nothing() -> None:
    assert failed(FIGURES, signed=False) == ["signature"]


def test_gates_without_a_limit_are_not_there() -> None:
    assert sorted(judge(FIGURES, Limits())) == ["held-out", "withdrawn", "worst-client"]


def test_a_run_that_has_not_finished_has_no_figures(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run that has finished"):
        gate_figures(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"status": "failed", "reason": "too few"}))
    with pytest.raises(ConfigError, match="has not completed \\(too few\\)"):
        gate_figures(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"status": "completed", "held_out": {}}))
    assert gate_figures(tmp_path) == GateFigures()
    (tmp_path / "withdrawals").mkdir()
    key = Ed25519PrivateKey.generate()
    for number, signer in enumerate((key, Ed25519PrivateKey.generate())):  # the other speaks for nobody here
        record = sign_withdrawal(signer, ["anna", "ben"], "2026-11-27T18:00:00+00:00")
        (tmp_path / "withdrawals" / f"{number}.json").write_bytes(record)
    assert gate_figures(tmp_path) == GateFigures()
    note_clients(tmp_path, {name: {"site": public_text(key)} for name in ("anna", "cleo")})
    assert gate_figures(tmp_path) == GateFigures(withdrawn=1)
