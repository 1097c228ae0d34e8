"""The benchmark of masked sums sends and sums what the protocol does."""

import pytest

from scripts.benchmarks.secure import goals_of, measured_sum
from scripts.benchmarks.shared_sums import measured_shared


@pytest.mark.soak
def test_a_measured_sum_is_exact_and_counts_its_bytes() -> None:
    found = measured_sum(10, 2, 1, 2000)
    assert found["is_exact"]
    assert found["up_bytes"] == 3 * 2000 + 10 * (10 * 16 + 28 + 32)
    assert found["second_up_bytes"] == (10 - 2) * 10 * 16
    assert goals_of({"one": found}, {})["exact_sums"].met


@pytest.mark.soak
def test_a_sum_by_shares_is_exact_and_counts_its_bytes() -> None:
    found = measured_shared(5, 1, 2000)
    assert found["is_exact"]
    assert found["up_bytes"] == 3 * 2000 + 2 * 16 + 3 * 28
