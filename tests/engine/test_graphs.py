"""Recordings: which passes they serve, when they are made and dropped, and what happens where none can be."""

import random
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.engine.graphs import Recorder, Shelf, Sizes, num_padding, rounded_up

SIZES = Sizes(1000, 1000, 16, 100, 100, 500, 16, 4, 4)


@st.composite
def passes(draw: st.DrawFn) -> Sizes:
    """Return sizes that a pass may have: no sequence is longer than all tokens, or has fewer keys."""
    sequences = draw(st.integers(1, 40))
    longest = draw(st.integers(1, 300))
    tokens = draw(st.integers(longest + sequences - 1, longest * sequences))
    more = draw(st.integers(8, 60))  # a prefix that is shared has eight tokens
    shared = draw(st.integers(0, more * (sequences - 1)))
    supervised = draw(st.integers(0, tokens))
    samples, clients = draw(st.integers(1, sequences)), draw(st.integers(1, sequences))
    return Sizes(
        tokens, tokens + shared, sequences, longest, longest + more, supervised, samples, clients, clients
    )


def eager(run: Callable[[], torch.Tensor], _: object) -> Callable[[], torch.Tensor]:
    """Record nothing: run once, as a recorder does, and return the function itself."""
    run()
    return run


class Pass:
    """A pass that adds its inputs up; counts how often it is recorded."""

    def __init__(self) -> None:
        self.total = torch.zeros(1)
        self.made: list[Sizes] = []

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.total.add_(inputs)

    def find(self, shelf: Shelf[torch.Tensor], sizes: Sizes = SIZES, kind: str = "train") -> Any:
        def make() -> torch.Tensor:
            self.made.append(sizes)
            return torch.ones(1)

        return shelf.find(kind, sizes, make, self.run, self.total)


@given(passes())
def test_rounded_up_sizes_have_room_and_waste_little(needs: Sizes) -> None:
    room = rounded_up(needs)
    assert all(mine >= theirs for mine, theirs in zip(astuple(room), astuple(needs), strict=True))
    assert room.sequences >= needs.sequences + num_padding(needs, room)
    assert room.tokens <= needs.tokens * 9 / 8 + (needs.keys > needs.tokens) * (3 + needs.keys / 16)
    assert room.supervised <= needs.supervised * 5 / 4
    assert all(mine <= 3 * theirs + 2 for mine, theirs in zip(astuple(room), astuple(needs), strict=True))


def test_most_passes_of_a_training_are_replayed() -> None:
    """Seven clients with eight rows each, whose lengths differ as those of answers do."""
    draw, shelf, work = random.Random(0), Shelf[torch.Tensor](eager), Pass()

    def sizes() -> Sizes:
        lengths = [min(256, draw.randint(20, 320)) for _ in range(56)]
        tokens, learnt = sum(lengths), sum(draw.randint(1, length) for length in lengths)
        return rounded_up(Sizes(tokens, tokens, 56, max(lengths), max(lengths), learnt, 56, 7, 7))

    replayed = sum(work.find(shelf, sizes()) is not None for _ in range(120))
    assert replayed > 100


@given(passes())
def test_padding_has_lawful_sequences(needs: Sizes) -> None:
    room = rounded_up(needs)
    queries, keys = room.tokens - needs.tokens, room.keys - needs.keys
    number = num_padding(needs, room)
    for place in range(number):  # split evenly
        own, seen = (-(-(total - place) // number) for total in (queries, keys))
        assert 1 <= own <= min(seen, room.longest_queries)
        assert seen <= room.longest_keys
    assert number or queries == keys == 0


def test_recorded_at_the_second_use_then_replayed() -> None:
    shelf, work = Shelf[torch.Tensor](eager), Pass()
    assert work.find(shelf) is None
    recording = work.find(shelf)
    assert work.find(shelf) is recording
    assert len(work.made) == 1
    assert work.find(shelf, kind="evaluate") is None
    assert work.find(shelf, replace(SIZES, supervised=900)) is None


def test_recording_leaves_sums_as_they_were() -> None:
    shelf, work = Shelf[torch.Tensor](eager), Pass()
    work.find(shelf)
    recording = work.find(shelf)
    assert work.total.item() == 0
    recording.inputs.fill_(5.0)
    assert recording.replay().item() == work.total.item() == 5


def test_least_recently_used_recording_goes_first() -> None:
    shelf, work = Shelf[torch.Tensor](eager, most_kept=2), Pass()
    for kind in "aabbacc":  # a was used after b, so c takes b's place
        work.find(shelf, kind=kind)
    number = len(work.made)
    assert work.find(shelf, kind="a") is not None
    assert work.find(shelf, kind="c") is not None
    assert len(work.made) == number
    assert work.find(shelf, kind="b") is None  # and is new again
    assert work.find(shelf, kind="b") is not None


def test_kinds_counted_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.engine.graphs.MOST_COUNTED", 3)
    shelf, work = Shelf[torch.Tensor](eager), Pass()
    assert [work.find(shelf, kind=kind) for kind in "abcda"] == [None] * 5  # the first use of a is forgotten
    assert work.find(shelf, kind="a") is not None


def test_larger_recording_is_made_before_smaller_ones() -> None:
    shared: list[object] = []

    def record(run: Callable[[], torch.Tensor], shares: object) -> Callable[[], torch.Tensor]:
        shared.append(shares)
        return run

    shelf, work = Shelf[torch.Tensor](record), Pass()
    large = replace(SIZES, tokens=4000, keys=4000)
    for sizes in (SIZES, SIZES, large, large, SIZES):
        work.find(shelf, sizes)
    assert work.made == [SIZES, large, SIZES]
    assert shared[:2] == [None, None]  # the small one was forgotten
    assert shared[2] is not None


@pytest.mark.parametrize("error", [RuntimeError("capture\nfailed"), torch.OutOfMemoryError("full")])
def test_failed_recording_is_said_once_and_changes_nothing(
    error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(run: Callable[[], torch.Tensor], _: object) -> Callable[[], torch.Tensor]:
        run()
        raise error

    recorder: Recorder = fail
    shelf, work = Shelf[torch.Tensor](recorder), Pass()
    assert [work.find(shelf) for _ in range(4)] == [None] * 4
    assert work.total.item() == 0
    (line,) = caplog.messages
    assert "recorded" in line
    assert "\n" not in line


def test_smaller_passes_are_recorded_where_memory_was_short() -> None:
    def short(run: Callable[[], torch.Tensor], _: object) -> Callable[[], torch.Tensor]:
        if len(work.made) == 1:
            raise torch.OutOfMemoryError
        return run

    shelf, work = Shelf[torch.Tensor](short), Pass()
    assert [work.find(shelf) for _ in range(3)] == [None] * 3
    smaller = replace(SIZES, tokens=900, keys=900)
    assert work.find(shelf, smaller) is None
    assert work.find(shelf, smaller) is not None
