"""Near duplicates: an edited copy is found, fresh text is kept, the exact index decides."""

from fedllm.originality.duplicates import contaminated, jaccard, near_duplicates, shingles
from tests.builders import random_texts


def edited(text: tuple[int, ...], places: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if place in places else token for place, token in enumerate(text))


def test_the_jaccard_index_of_an_edit_is_what_its_shingles_say() -> None:
    text = tuple(range(100))
    # One changed token changes 5 of 96 shingles: 91 common of 96 + 5.
    assert jaccard(shingles(text), shingles(edited(text, (50,)))) == 91 / 101
    assert jaccard(shingles(text), shingles(text[::-1])) == 0
    assert jaccard(shingles((1, 2)), shingles((1, 2))) == 1
    assert jaccard(shingles(()), shingles(())) == 1


def test_an_edited_copy_is_found_and_fresh_text_is_kept() -> None:
    texts = random_texts([120] * 40)
    copy = edited(texts[7], (30, 90))
    assert near_duplicates([*texts, copy, texts[3]]) == (None,) * 40 + (7, 3)


def test_a_chain_of_copies_names_the_one_that_is_kept() -> None:
    (text,) = random_texts([120])
    assert near_duplicates([text, edited(text, (10,)), edited(text, (60,))]) == (None, 0, 0)


def test_the_exact_index_refuses_what_the_sketch_only_resembles() -> None:
    first, second = random_texts([120, 120])
    for cut in range(60, 120, 5):
        mixed = first[:cut] + second[cut:]
        is_copy = jaccard(shingles(first), shingles(mixed)) >= 0.7
        assert contaminated([mixed], [first]) == (is_copy,) or is_copy  # a miss near the line is possible
    assert contaminated([edited(first, (5, 70)), second], [first]) == (True, False)
