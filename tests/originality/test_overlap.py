"""Overlap with private text: a copy is refused, fresh text passes, hashes of different keys never meet."""

import numpy as np
import pytest

from fedllm.errors import DataError
from fedllm.originality.overlap import (
    FEWEST_SHINGLES,
    MAX_SHINGLES,
    MAX_TEXTS,
    Overlap,
    OverlapRequest,
    Probe,
    coarse,
    hashes,
    most,
    overlaps,
    private_hashes,
    probe,
)

SALT = bytes(range(16))
PRIVATE = [tuple(range(1000, 1200)), tuple(range(3000, 3030)), (7, 8, 9, 10, 11, 12, 13, 14, 15)]


def fresh(length: int, begin: int = 100_000) -> tuple[int, ...]:
    return tuple(range(begin, begin + length))


def overlap_of(tokens: tuple[int, ...], **options: tuple[int, ...]) -> Overlap:
    (found,) = overlaps([probe(tokens, SALT, **options)], private_hashes(PRIVATE, SALT))
    return found


def test_fresh_text_matches_nothing_and_passes() -> None:
    assert overlap_of(fresh(80)) == Overlap(num_shingles=68, num_matched=0, verbatim=False)
    assert overlap_of(fresh(80)).is_original


def test_a_verbatim_copy_of_private_text_is_refused() -> None:
    found = overlap_of(PRIVATE[0])
    assert found == Overlap(num_shingles=188, num_matched=188, verbatim=True)
    assert not found.is_original


@pytest.mark.parametrize(("copied", "verbatim"), [(49, False), (50, True)])
def test_a_run_of_fifty_tokens_is_enough_however_long_the_text(copied: int, verbatim: bool) -> None:
    found = overlap_of(fresh(400) + PRIVATE[0][20 : 20 + copied] + fresh(400, 200_000))
    assert found.num_matched == copied - 12
    assert found.num_matched < 0.2 * found.num_shingles
    assert (found.verbatim, found.is_original) == (verbatim, not verbatim)


def test_more_than_a_fifth_of_the_shingles_is_too_much() -> None:
    # 25 copied tokens have 13 shingles of 13; the text has 65 or 64 in all.
    at_limit, above = (overlap_of(PRIVATE[0][:25] + fresh(rest)) for rest in (52, 51))
    assert (at_limit.num_matched, at_limit.num_shingles, at_limit.is_original) == (13, 65, True)
    assert (above.num_matched, above.num_shingles, above.is_original) == (13, 64, False)


def test_a_short_text_is_cut_into_shingles_of_eight() -> None:
    found = overlap_of(PRIVATE[1][:10] + fresh(4))
    assert found == Overlap(num_shingles=7, num_matched=3, verbatim=False)
    assert not found.is_original
    assert not overlap_of(PRIVATE[2]).is_original


def test_a_text_too_short_to_be_checked_does_not_pass() -> None:
    assert not overlap_of(fresh(7)).is_original
    assert overlap_of(fresh(8)).is_original


def test_the_form_that_every_text_has_does_not_count() -> None:
    form = PRIVATE[0][:20]
    text = form + fresh(60)
    assert overlap_of(text).num_matched == 8
    found = overlap_of(text, boilerplate=form)
    assert (found.num_matched, found.num_shingles) == (0, 48)
    assert overlap_of(form + fresh(30) + form, boilerplate=form).num_matched == 0
    # Not even as the beginning of a run: 20 of these 60 tokens are form.
    assert not overlap_of(PRIVATE[0][:60] + fresh(400), boilerplate=form).verbatim
    assert overlap_of(PRIVATE[0][:70] + fresh(400), boilerplate=form).verbatim


def test_hashes_under_another_key_or_of_another_size_never_meet() -> None:
    own = hashes(PRIVATE[0], 13, SALT)
    assert len(own) == 188
    assert not np.isin(own, hashes(PRIVATE[0], 13, bytes(16))).any()
    assert not np.isin(own, hashes(PRIVATE[0], 12, SALT)).any()
    assert np.array_equal(own, hashes(PRIVATE[0], 13, SALT))


def test_the_most_of_several_owners_hides_which_of_them_it_was() -> None:
    probes = [probe(text, SALT) for text in (PRIVATE[0], PRIVATE[1], fresh(30))]
    each = [overlaps(probes, private_hashes([row], SALT)) for row in PRIVATE]
    together = overlaps(probes, private_hashes(PRIVATE, SALT))
    assert most(each) == most(each[::-1]) == together


def test_queries_are_bounded() -> None:
    few, many = np.zeros(1, np.uint64), np.zeros(MAX_SHINGLES + 1, np.uint64)
    with pytest.raises(DataError, match="cut it shorter"):
        Probe(many, few)
    for number in (0, MAX_TEXTS + 1):
        with pytest.raises(DataError, match="1 to 4096 texts"):
            OverlapRequest(1, SALT, (Probe(few, few),) * number)
    with pytest.raises(DataError, match="16 bytes"):
        OverlapRequest(1, b"", (Probe(few, few),))


@pytest.mark.parametrize("number", [FEWEST_SHINGLES, 9, 37, 65, 188])
def test_what_leaves_is_coarse_and_gives_the_same_verdict(number: int) -> None:
    left = [coarse(Overlap(number, matched, verbatim=False)) for matched in range(number + 1)]
    exact = [Overlap(number, matched, verbatim=False) for matched in range(number + 1)]
    assert [one.is_original for one in left] == [one.is_original for one in exact]
    assert len({one.num_matched for one in left}) <= 5
    assert (left[0].num_matched, left[1].num_matched, left[-1].num_matched) == (0, 0, number)
    assert coarse(Overlap(number, 0, verbatim=True)).verbatim


def test_of_a_short_text_nothing_is_told() -> None:
    told = {
        coarse(Overlap(FEWEST_SHINGLES - 1, matched, verbatim=verbatim))
        for matched in (0, FEWEST_SHINGLES - 1)
        for verbatim in (False, True)
    }
    (same,) = told
    assert not same.is_original
