"""What a server learns that tells each party another list of those who answered, with or without colluders.

A party opens shares for one list, in which it stands itself. Told that j answered, it opens its shares of j's
own mask and of j's masks with those who are lost by that list. A seed is known once a threshold of parties,
colluders among them, have opened it. Then parties that no unknown mask connects form the smallest sums that
the server can read.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.secure.parties import threshold_of

Answered = frozenset[int]


def lists_for(party: int, number: int) -> list[Answered]:
    """Return the lists to which a party opens anything."""
    sizes = range(threshold_of(number), number + 1)
    every = (frozenset(each) for size in sizes for each in combinations(range(number), size))
    return [answered for answered in every if party in answered]


def readable_sums(
    lists: Sequence[Answered], colluders: int, is_given_away: bool = False
) -> Iterator[set[int]]:
    """Yield the sums that a server reads which has told honest party i the list `lists[i]`.

    `is_given_away`: parties do not wait for shares of the masks that they have in common with lost ones.
    """
    honest = range(len(lists))
    threshold = threshold_of(len(lists) + colluders)

    def is_known(one: int, other: int) -> bool:
        told = sum(one in answered and other not in answered for answered in lists)
        return told + colluders >= threshold or (is_given_away and other not in lists[one])

    left = set(honest)
    while left:
        connected = {left.pop()}
        while more := {
            other
            for other in left
            for one in connected
            if not is_known(one, other) and not is_known(other, one)
        }:
            connected |= more
            left -= more
        if all(sum(one in answered for answered in lists) + colluders >= threshold for one in connected):
            yield connected


def smallest(number: int, colluders: int, **how: bool) -> int:
    """Return the fewest parties in a sum that any choice of lists opens."""
    choices = product(*(lists_for(party, number) for party in range(number - colluders)))
    return min(len(each) for lists in choices for each in readable_sums(lists, colluders, **how))


@pytest.mark.parametrize(("number", "colluders"), [(3, 0), (4, 0), (4, 1), (5, 0), (5, 1), (5, 2)])
def test_no_lists_open_a_sum_below_the_bound(number: int, colluders: int) -> None:
    bound = 2 * threshold_of(number) - number - colluders + 1
    assert smallest(number, colluders) >= bound >= 2


@settings(deadline=None, max_examples=60)
@given(data=st.data(), number=st.integers(6, 9))
def test_the_bound_holds_among_more_parties(data: st.DataObject, number: int) -> None:
    spare = 2 * threshold_of(number) - number
    colluders = data.draw(st.integers(0, spare - 1))
    lists = [data.draw(st.sampled_from(lists_for(party, number))) for party in range(number - colluders)]
    assert all(len(each) >= spare - colluders + 1 for each in readable_sums(lists, colluders))


def test_the_bound_is_reached_by_six_parties() -> None:
    lists = [{0, 1, 2, 3}, {0, 1, 2, 4}, {0, 1, 2, 5}, {0, 1, 2, 3}, {0, 1, 2, 4}, {0, 1, 2, 5}]
    assert {0, 1, 2} in list(readable_sums([frozenset(each) for each in lists], 0))


def test_a_third_of_colluders_reads_one_party() -> None:
    assert [smallest(3, 1), smallest(4, 2), smallest(5, 3)] == [1, 1, 1]


def test_masks_given_away_at_once_would_open_one_party() -> None:
    assert smallest(3, 0, is_given_away=True) == 1
