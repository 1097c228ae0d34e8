"""Places and weights are dealt to sites: arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.messages import JoinedClient
from strategies.cohort.voices import limited, shared_out, voice_of, with_places
from tests.builders import client_update


def client(name: str, node: int, site: str = "") -> JoinedClient:
    return JoinedClient(
        client_id=name, node_id=node, num_train=1, num_held_out=0, fingerprint="f" * 64, site=site
    )


def federation(sizes: list[int]) -> dict[str, JoinedClient]:
    """Return the clients of nodes 0, 1, ... that declare so many each, the last node's first."""
    named = [(f"n{node}-{k:02d}", node) for node, size in enumerate(sizes) for k in range(size)]
    return {name: client(name, node) for name, node in reversed(named)}


def places(clients: dict[str, JoinedClient], number: int, connected: set[int]) -> list[int]:
    counts: dict[int, int] = {}
    for one in with_places(clients, number, connected).values():
        counts[one.node_id] = counts.get(one.node_id, 0) + 1
    return [counts.get(node, 0) for node in range(10)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 20))
def test_no_node_has_a_second_place_before_all_have_one(sizes: list[int], number: int) -> None:
    found = places(federation(sizes), number, set(range(10)))[: len(sizes)]
    assert sum(found) == min(number, sum(sizes))
    for place, size in zip(found, sizes, strict=True):
        assert place == size or place >= max(found) - 1, "who has fewer could have had no more"


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_none_of_three_sites_is_larger_than_all_others(sizes: list[int]) -> None:
    found = with_places(federation(sizes), 100, set(range(6)), is_bounded=True)
    counts = [sum(one.node_id == node for one in found.values()) for node in range(len(sizes))]
    if len(sizes) < 3:
        assert sum(counts) == min(sum(sizes), 100)
        return
    assert max(counts) <= sum(counts) - max(counts) + (sum(sizes) > 100)
    if sum(sizes) <= 100 and max(sizes) <= sum(sizes) - max(sizes):
        assert counts == sizes, "nodes that share the clients evenly lose none"


def test_nobody_loses_a_place_while_there_are_enough() -> None:
    clients = federation([1, 5])
    assert with_places(clients, 6, {0}) == clients


def test_of_equals_the_connected_and_the_earlier_stay() -> None:
    assert places(federation([1, 1, 1]), 2, {0, 1, 2}) == [0, 1, 1] + 7 * [0], "2 and 1 came first"
    assert places(federation([1, 1, 1]), 2, {0, 2}) == [1, 0, 1] + 7 * [0]


def test_nodes_of_one_site_are_one_voice() -> None:
    clients = {f"c{node}": client(f"c{node}", node, "north" if node < 8 else "") for node in range(10)}
    assert {voice_of(one) for one in clients.values()} == {"north", "node 8", "node 9"}
    assert places(clients, 3, set(range(10))) == [1] + 7 * [0] + [1, 1]


def test_a_lie_about_rows_counts_as_a_multiple_of_the_median() -> None:
    voices = {"a": "n1", "b": "n2", "c": "n3", "x": "n4", "y": "n4"}
    weights = {"a": 10.0, "b": 20.0, "c": 30.0, "x": 1e15, "y": 3e15}
    assert shared_out(weights, voices, {}, 10.0) == weights | {"x": 50.0, "y": 150.0}
    assert shared_out(weights, voices, {}, 1.0) == {"a": 10.0, "b": 20.0, "c": 20.0, "x": 5.0, "y": 15.0}
    assert shared_out(weights, voices, {"n4": 8.0}, 10.0) == pytest.approx(weights | {"x": 2.0, "y": 6.0})
    assert shared_out({}, {}, {}, 10.0) == {}


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=4, max_size=13))
def test_under_robust_rules_a_quarter_of_liars_weighs_less_than_half(honest: list[float]) -> None:
    liars = (len(honest) - 1) // 3  # fewer than a quarter of all
    weights = dict(enumerate([*honest, *(liars * [1e300])]))
    named = {str(name): weight for name, weight in weights.items()}
    found = shared_out(named, {name: name for name in named}, {}, 1.0)
    lies = sum(found[str(name)] for name in range(len(honest), len(weights)))
    assert lies < sum(found.values()) / 2


def test_an_update_weighs_what_its_clients_may() -> None:
    update = client_update("a", torch.zeros(3), weight=6.0)
    assert limited(update, {}) is update
    assert limited(update, {"a": 6.0}) is update
    assert limited(update, {"a": 1.5}).weight == 1.5


def test_a_sum_weighs_what_its_members_may_together() -> None:
    members = tuple(
        client_update(name, torch.zeros(0), weight=weight) for name, weight in (("a", 6.0), ("b", 2.0))
    )
    total = client_update("a", torch.zeros(3), weight=8.0, members=members)
    found = limited(total, {"a": 3.0, "b": 9.0})
    assert found.weight == 5.0
    assert [member.weight for member in found.members] == pytest.approx([3.75, 1.25])
