"""The benchmark of the distillation step on a tiny model."""

import json

import pytest

from scripts.benchmarks.distillation import QUICK, TEACHERS, main, open_bench, round_flop, step_flop
from scripts.benchmarks.models import TINY
from scripts.benchmarks.options import ModelOptions

pytestmark = pytest.mark.usefixtures("small_shapes")


def test_arithmetic_of_the_step_grows_by_one_reading_a_teacher() -> None:
    bench = open_bench(TINY, "cpu", "all-linear", 0, QUICK)
    one, two, four = (step_flop(bench, number) for number in (1, 2, 4))
    assert two - one == pytest.approx((four - two) / 2)
    assert round_flop(bench, 4) == pytest.approx(4 * round_flop(bench, 1))


@pytest.mark.soak
def test_the_benchmark_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    main(ModelOptions(quick=True, json=True, model=TINY))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["name"] == "bench_distillation"
    figures = report["figures"]["models"][TINY]
    assert [int(number) for number in figures] == list(TEACHERS)
    for number, row in figures.items():
        assert row["step_flop"] > 0
        assert row["adapter_bytes"] * 1 == int(number) * figures["1"]["adapter_bytes"]
    assert set(report["goals"]) == {"seconds_over_flop_of_step_over_round"}
