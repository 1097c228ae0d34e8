"""A site has one voice under every robust rule, however many clients it says it has."""

import pytest
import torch

from fedllm.adapters.layout import initial_adapter
from fedllm.config.run_config import KEYS
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import COORDINATE_RULES, AggregationRule
from fedllm.runs.checkpoint import ServerState
from strategies.aggregation import combine, robust
from tests.strategies.aggregation.builders import LAYOUT, dense, gaussian, trained_start, update

RULES = [name for name in KEYS["aggregation.robust"].words if name != "none"]
START = trained_start()


def honest(number: int) -> list[ClientUpdate]:
    common = gaussian(LAYOUT.size, 1)
    return [update(f"c{i}", 0.05 * (common + 0.5 * gaussian(LAYOUT.size, 100 + i))) for i in range(number)]


def change(name: str, updates: list[ClientUpdate], voices: dict[str, str]) -> torch.Tensor:
    """Return what a round under the rule adds to the products, flat."""
    rule = AggregationRule(robust=name, train="b", read_out="factor-mean")
    mixture = combine.RoundUpdates(
        rule, ServerState(0, START), trained="b", fresh=lambda: initial_adapter(LAYOUT, 7), voices=voices
    )
    for item in updates:
        mixture = combine.add(mixture, item)
    after = combine.finish(mixture).adapter.vector
    pairs = zip(dense(after), dense(START.vector), strict=True)
    return torch.cat([(one - other).flatten() for one, other in pairs])


@pytest.mark.parametrize("name", RULES)
def test_one_site_of_twenty_clients_turns_no_model(name: str) -> None:
    sound = honest(8)
    hostile = [update(f"z{i:02d}", -30 * sound[0].delta, 0.05) for i in range(20)]
    sites = {item.client_id: "node 9" for item in hostile}
    clean = change(name, sound, {})
    found = change(name, [*sound, *hostile], sites)
    assert float(found @ clean / found.norm() / clean.norm()) > 0.8
    if name in COORDINATE_RULES or name == "multi-krum":  # which count, and do not weigh
        fooled = change(name, [*sound, *hostile], {})
        assert float(fooled @ clean / fooled.norm() / clean.norm()) < 0


@pytest.mark.parametrize("name", RULES)
def test_a_site_split_into_equal_clients_counts_as_before(name: str) -> None:
    others, own = honest(5), update("own", 0.05 * gaussian(LAYOUT.size, 7), 3.0)
    parts = [update(f"own{i}", own.delta, 1.0) for i in range(3)]
    split = change(name, [*others, *parts], {part.client_id: "own" for part in parts})
    torch.testing.assert_close(split, change(name, [*others, own], {}), rtol=1e-5, atol=1e-7)


def test_a_site_is_the_mean_of_its_clients_by_weight() -> None:
    p_K = torch.tensor([0.1, 0.3, 0.2, 0.4]).double()
    assert robust.site_means(["a", "b", "c", "d"], p_K) is None
    means_VK = robust.site_means(["a", "b", "a", "b"], p_K)
    assert means_VK is not None
    expected = torch.tensor([[1 / 3, 0, 2 / 3, 0], [0, 3 / 7, 0, 4 / 7]]).double()
    torch.testing.assert_close(means_VK, expected)


@pytest.mark.parametrize("name", RULES)
def test_a_site_whose_weights_vanish_spoils_nothing(name: str) -> None:
    sound = honest(5)
    hostile = [update(f"z{i}", sound[0].delta, 1e-323) for i in range(2)]
    assert bool(change(name, [*sound, *hostile], dict.fromkeys(("z0", "z1"), "node 9")).isfinite().all())
