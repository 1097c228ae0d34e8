"""Nothing is timed before results agree; memory and time are those of the work."""

import sys

import pytest
import torch

from scripts.benchmarks.agreement import Tolerance, checked_difference, compare, delta_difference
from scripts.benchmarks.memory import peak_memory
from scripts.benchmarks.timing import Timing
from scripts.reports import Spread

CPU = torch.device("cpu")
LOOSE = Tolerance(1.0, 1e-3)


def test_the_clock_counts_where_a_gpu_computes() -> None:
    timing = Timing(cpu=3.0, wall=5.0)
    assert timing.busy(CPU) == 3.0
    assert timing.busy(torch.device("cuda")) == 5.0


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory")
def test_peak_memory_is_what_work_needed_at_once() -> None:
    def in_turn() -> int:
        return sum(len(torch.ones(4 * 2**20)) for _ in range(3))  # 16 MiB, three times

    def together() -> int:
        return len(torch.cat([torch.ones(4 * 2**20) for _ in range(3)]))  # 48 MiB, and as much again

    for _ in range(2):
        (length, small), (again, large) = (peak_memory(work, CPU) for work in (in_turn, together))
        assert length == again == 12 * 2**20
        if small is None or large is None:
            pytest.skip("this kernel does not let a process reset its peak")
        assert 15 * 2**20 < small < 40 * 2**20
        assert 90 * 2**20 < large < 120 * 2**20


def test_difference_is_relative_to_the_largest_movement() -> None:
    expected = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    found = expected + torch.tensor([[0.0, 0.2, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]])
    assert delta_difference(found, expected, 1.0) == pytest.approx(0.2)
    assert delta_difference(found, expected, 0.5) == 0.0


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_variants_that_differ_are_never_timed(value: float) -> None:
    calls: list[str] = []

    def work(name: str, values: float) -> torch.Tensor:
        calls.append(name)
        return torch.tensor([[1.0, values]])

    with pytest.raises(RuntimeError, match="b trained another adapter"):
        compare({"a": lambda: work("a", 1.0), "b": lambda: work("b", value)}, CPU, 5, LOOSE)
    assert calls == ["a", "b"]


def test_variants_are_compared_again_in_every_repetition() -> None:
    values = iter([1.0, 1.0, 1.1])
    steady = torch.tensor([[1.0, 1.0]])
    with pytest.raises(RuntimeError, match="another adapter"):
        compare({"a": lambda: steady, "b": lambda: steady * next(values)}, CPU, 5, LOOSE)
    assert list(values) == []


@pytest.mark.soak
def test_what_stands_apart_is_timed_and_not_compared() -> None:
    steady = torch.tensor([[1.0, 1.0]])
    compared = compare(
        {"a": lambda: steady, "b": lambda: steady + 1e-4}, CPU, 3, LOOSE, apart={"other": lambda: -steady}
    )
    assert {name: len(timings) for name, timings in compared.timings.items()} == {"other": 3, "a": 3, "b": 3}
    assert compared.difference == pytest.approx(1e-4, rel=1e-2)
    assert compared.ratio("a", "a") == Spread(1.0, 1.0, 1.0)
    assert set(compared.figures("other")) == {"cpu_s", "wall_s", "peak_bytes"}


def test_one_variant_alone_agrees_with_itself() -> None:
    assert checked_difference({"a": torch.ones(1, 3)}, LOOSE) == 0.0
