import json
from dataclasses import replace

import pytest
import torch

from fedllm.plan.aggregation import AggregationRule
from scripts.benchmarks import aggregation
from scripts.benchmarks.aggregation import (
    Case,
    Model,
    Shape,
    aggregate,
    check,
    form_dense,
    make_case,
)

SHAPE = Shape(12, 20, 3)


def test_the_anchor_is_the_dense_mean_of_products() -> None:
    case = make_case(SHAPE, 2, 9, 0)
    total = sum(update.weight for update in case.updates)
    expected = torch.zeros(3, 12, 20).double()
    for update in case.updates:
        factors = case.start.layout.factors((case.start.vector + update.delta).double())
        for matrix, (a_RI, b_OR) in zip(expected, factors, strict=True):
            matrix += update.weight / total * b_OR @ a_RI
    for at_once in (1, 4, 64):
        torch.testing.assert_close(form_dense(case, at_once), expected, rtol=1e-5, atol=1e-7)


def test_rules_and_anchor_must_agree_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SHAPE, 2, 5, 0)
    check(case, aggregation.RULES)
    other = replace(case.updates[0], weight=100.0)
    broken = Case(case.start, (other, *case.updates[1:]))
    monkeypatch.setattr(aggregation, "form_dense", lambda _: form_dense(broken))
    with pytest.raises(RuntimeError, match="factor-mean reports another change"):
        check(case, aggregation.RULES)


def test_a_case_is_the_same_for_the_same_seed() -> None:
    first, second = (aggregate(make_case(SHAPE, 2, 4, 3), AggregationRule()) for _ in range(2))
    assert first == second != aggregate(make_case(SHAPE, 2, 4, 4), AggregationRule())


def test_a_total_counts_every_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = aggregation.measure(SHAPE, 2, 3, 0, 1)
    total = aggregation.totals(Model(2, (SHAPE, replace(SHAPE, number=2))), [figures, figures])
    assert total["svd"] == pytest.approx(5 * figures["svd"]["cpu_s"].median)


@pytest.mark.soak
def test_the_benchmark_prints_one_object(capsys, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "MODELS", {"tiny": Model(2, (SHAPE, Shape(8, 6, 2)))})
    monkeypatch.setattr(aggregation, "MOST_HELD", 20)
    kept = tmp_path / "figures.json"
    aggregation.main(aggregation.Options(quick=True, repetitions=1, json=True, output=kept))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(kept.read_text())
    counts = result["figures"]["models"]["tiny"]
    assert {name: set(one["total_cpu_s"]) for name, one in counts.items()} == {
        "10": {"dense", "factor-mean", "svd", "svd by geometric median"},
        "100": {"dense", "factor-mean", "svd"},
        "1000": {"dense", "factor-mean", "svd"},
    }
    assert set(result["goals"]) == {"svd_vs_dense_10_clients"}
