from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.seeds import derive_seed

names = st.lists(st.text(max_size=4) | st.integers(), max_size=4).map(tuple)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**63 - 1), names, names)
def test_streams_are_named_by_all_they_are_for(seed: int, first: tuple, second: tuple) -> None:
    stream = derive_seed(seed, *first)
    assert 0 <= stream < 2**63
    assert derive_seed(seed, *first) == stream
    assert derive_seed(seed + 1, *first) != stream
    same = [(type(name), name) for name in first] == [(type(name), name) for name in second]
    assert (derive_seed(seed, *second) == stream) == same
