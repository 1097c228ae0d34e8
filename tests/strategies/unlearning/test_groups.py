"""Groups of clients: who is in which depends on nobody else, and their adapters' mean is that of products."""

import torch

from fedllm.adapters.layout import AdapterState
from strategies.unlearning.groups import in_groups, mean_of_groups
from tests.builders import small_layout

NAMES = [f"client-{number}" for number in range(40)]


def test_a_client_that_leaves_moves_nobody_to_another_group() -> None:
    groups = in_groups(NAMES, 4, seed=3)
    without = in_groups([name for name in NAMES if name != "client-7"], 4, seed=3)
    assert {one: [name for name in names if name != "client-7"] for one, names in groups.items()} == without
    assert sorted(name for names in groups.values() for name in names) == sorted(NAMES)
    assert len(groups) == 4
    assert in_groups(NAMES, 4, seed=4) != groups


def test_the_mean_of_groups_is_that_of_their_products() -> None:
    layout = small_layout(rank=4)
    vectors = [torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for vector in vectors:  # two products of rank 2, whose mean a rank of 4 holds
        for a, b in layout.factors(vector):
            a[2:], b[:, 2:] = 0, 0
    found = mean_of_groups([AdapterState(layout, vector) for vector in vectors], [3, 1])
    pairs = zip(*(layout.factors(vector) for vector in (*vectors, found.vector)), strict=True)
    for (a0, b0), (a1, b1), (a, b) in pairs:
        torch.testing.assert_close(b @ a, 0.75 * b0 @ a0 + 0.25 * b1 @ a1, atol=1e-5, rtol=1e-5)
