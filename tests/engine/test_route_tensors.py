import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.engine.route_tensors import TILE, route_arrays

RUN = st.tuples(st.integers(1, 3 * TILE), st.integers(0, 3))  # tokens and client; the slot is the place


@settings(deadline=None, max_examples=50)
@given(st.lists(RUN, min_size=1, max_size=6), st.integers(0, 2), st.integers(0, 70))
def test_tiles_and_slots_part_the_tokens(runs: list, num_empty: int, num_padding: int) -> None:
    lengths, clients = (np.array(values) for values in zip(*runs, (num_padding, 0), strict=True))
    slots = np.array([*range(len(runs)), -1])
    found = route_arrays(lengths, clients, slots, len(runs) + num_empty)
    owners = np.repeat(clients, lengths)
    assert found["owners_T"].tolist() == owners.tolist()
    assert found["slots_T"].tolist() == np.repeat(slots.clip(0), lengths).tolist()

    tiles = list(zip(found["tile_begin"], found["tile_end"], found["tile_client"], strict=True))
    for begin, end, client in tiles:
        assert 0 < end - begin <= TILE
        assert set(owners[begin:end]) == {client}
    assert [place for begin, end, _ in tiles for place in range(begin, end)] == list(range(len(owners)))

    ends = lengths[:-1].cumsum()
    assert found["slot_end_S"][: len(runs)].tolist() == ends.tolist()
    assert found["slot_begin_S"][: len(runs)].tolist() == (ends - lengths[:-1]).tolist()
    assert not found["slot_end_S"][len(runs) :].any()


def test_neighbouring_runs_of_a_client_share_tiles() -> None:
    found = route_arrays(np.array([10, 20, 5]), np.array([1, 1, 0]), np.array([0, 1, 2]), 3)
    assert found["tile_begin"].tolist() == [0, 30]
    assert found["tile_end"].tolist() == [30, 35]
    assert found["tile_client"].tolist() == [1, 0]
