"""Passes recorded once and replayed: a GPU then does not wait for Python between thousands of small kernels.

A recording (a CUDA graph) is fixed to addresses and sizes. So its inputs lie in a buffer that every pass
refills, and sizes are rounded up: what a pass lacks is filled with tokens of no slot and of weight zero,
which change no sum. A pass is recorded when its like comes for the second time, and a few recordings are
kept. What cannot be recorded is computed as usual, after one line that says so. All of this is decided
without a GPU; `record_on_gpu` alone needs one.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import astuple, dataclass, replace
from typing import Generic, TypeVar

import torch

from fedllm.models.files import first_line

MOST_KEPT = 16  # they share their memory: all of them need what the largest does
_SLACK = 9 / 8  # a recording that is larger than needed by no more than this serves as well

B = TypeVar("B")

Replay = Callable[[], torch.Tensor]  # does again what was recorded, and returns the same tensor as then

# (a function, a recording to share memory with) -> the function's recording, for which it is run a few times.
Recorder = Callable[[Callable[[], torch.Tensor], Replay | None], Replay]

_logger = logging.getLogger("fedllm.training")


@dataclass(frozen=True)
class Sizes:
    """How much a pass holds, or a recording has room for."""

    tokens: int
    keys: int  # of attention: the tokens, and those of a shared prefix once more for each of its rows
    sequences: int
    longest_queries: int  # of a sequence
    longest_keys: int
    supervised: int
    samples: int
    clients: int
    slots: int

    def hold(self, needs: "Sizes") -> bool:
        """Return whether a recording of these sizes has room for a pass and the padding beside it."""
        if any(mine < theirs for mine, theirs in zip(astuple(self), astuple(needs), strict=True)):
            return False
        queries, keys, padding = self.tokens - needs.tokens, self.keys - needs.keys, num_padding(needs, self)
        return padding <= queries <= keys and needs.sequences + padding <= self.sequences

    def waste_little(self, needs: "Sizes") -> bool:
        """Return whether what costs time is hardly larger than a pass needs it."""
        return self.tokens <= _SLACK * needs.tokens and self.supervised <= _SLACK * needs.supervised


def num_padding(needs: Sizes, room: Sizes) -> int:
    """Return how many sequences hold the padding: each has a query, and no fewer keys than queries."""
    queries, keys = room.tokens - needs.tokens, room.keys - needs.keys
    return max(-(-queries // room.longest_queries), -(-keys // room.longest_keys))


def rounded_up(needs: Sizes) -> Sizes:
    """Return the sizes of a recording for a pass and others like it.

    About 1/16 more tokens at most and 1/8 more logits; what costs next to nothing grows by up to half.
    """
    longest_keys, shared_keys = _rounded(needs.longest_keys, 2), needs.keys - needs.tokens
    more_keys = _rounded(shared_keys, 8)
    # Keys that fill up need queries which see them: two for every sequence of such keys are always enough.
    tokens = _rounded(needs.tokens + 2 * -(-(more_keys - shared_keys) // longest_keys), 16)
    room = Sizes(
        tokens,
        tokens + more_keys,
        needs.sequences,
        _rounded(needs.longest_queries, 2),
        longest_keys,
        _rounded(needs.supervised, 8),
        *(_rounded(number, 2) for number in (needs.samples, needs.clients, needs.slots)),
    )
    return replace(room, sequences=_rounded(needs.sequences + num_padding(needs, room), 2))


def _rounded(number: int, steps: int) -> int:
    """Return the next number of those that part every span between two powers of two into `steps`."""
    step = max(1, (1 << max(0, number - 1).bit_length()) // (2 * steps))
    return -(-number // step) * step


@dataclass(frozen=True, eq=False)
class Recording(Generic[B]):
    """A recorded pass: what is written to `inputs` is what `replay` computes with."""

    kind: Hashable
    room: Sizes
    inputs: B
    replay: Replay


class Shelf(Generic[B]):
    """The recordings that are kept, and which passes were seen. They may share memory: a result that a replay
    returns must be used before the next replay.
    """

    def __init__(self, record: Recorder, most_kept: int = MOST_KEPT):
        self._record = record
        self._most_kept = most_kept
        self._kept: list[Recording[B]] = []  # the least recently used first
        self._uses: Counter[tuple[Hashable, Sizes]] = Counter()
        self._is_off = False

    def find(
        self,
        kind: Hashable,
        needs: Sizes,
        make_inputs: Callable[[Sizes], B],
        run: Callable[[B], torch.Tensor],
        changed: torch.Tensor,
    ) -> Recording[B] | None:
        """Return a recording with room for a pass, made now where it is due; None: compute it as usual.

        `kind` is all that must be equal, addresses included. `run` is the pass on inputs of given sizes; it
        adds to `changed`, which stays as it is until the recording is replayed.
        """
        if self._is_off:
            return None
        for recording in self._kept:
            if recording.kind == kind and recording.room.hold(needs) and recording.room.waste_little(needs):
                self._kept.remove(recording)
                self._kept.append(recording)
                return recording
        key = kind, rounded_up(needs)
        self._uses[key] += 1
        return self._made(*key, make_inputs, run, changed) if self._uses[key] > 1 else None

    def clear(self) -> None:
        """Forget all recordings, so that their memory is free."""
        self._kept.clear()

    def _made(
        self,
        kind: Hashable,
        room: Sizes,
        make_inputs: Callable[[Sizes], B],
        run: Callable[[B], torch.Tensor],
        changed: torch.Tensor,
    ) -> Recording[B] | None:
        """Return a new recording, kept in place of the least recently used; None where it cannot be made."""
        if all(kept.room.tokens < room.tokens for kept in self._kept):
            # The largest must come first: smaller ones fit into its memory, but not the other way round.
            self.clear()
        before = changed.clone()  # recording runs the pass for real
        inputs = make_inputs(room)
        failure = ""
        try:
            replay = self._record(lambda: run(inputs), self._kept[-1].replay if self._kept else None)
        except RuntimeError as error:  # torch's for a failed capture and for too little memory
            failure = first_line(error)
        changed.copy_(before)
        if failure:  # acted on here, when what the failed pass held is free
            self._is_off = True
            self.clear()
            _logger.warning("passes cannot be recorded (%s): they are computed one kernel at a time", failure)
            return None
        while len(self._kept) >= self._most_kept:
            dropped = self._kept.pop(0)
            del self._uses[dropped.kind, dropped.room]  # so that many kinds in turn do not record every time
        self._kept.append(Recording(kind, room, inputs, replay))
        return self._kept[-1]


@dataclass(frozen=True, eq=False)
class GraphReplay:
    """A CUDA graph as a `Replay`."""

    graph: torch.cuda.CUDAGraph
    output: torch.Tensor

    def __call__(self) -> torch.Tensor:
        """Queue the graph's kernels, and return what they write."""
        self.graph.replay()
        return self.output


def record_on_gpu(
    device: torch.device, run: Callable[[], torch.Tensor], shares: Replay | None
) -> GraphReplay:
    """Record `run` as a CUDA graph; see `Recorder`.

    Raises:
        RuntimeError: CUDA or a kernel refuses, or memory does not suffice.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            aside
        ):  # what is made once, as compiled kernels, must not become part of a graph
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        pool = shares.graph.pool() if isinstance(shares, GraphReplay) else None
        # Other threads of the process, which write checkpoints, say, may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = run()
    return GraphReplay(graph, output)
