"""Passes recorded once and replayed: a GPU then does not wait for Python between thousands of small kernels.

A recording (a CUDA graph) is fixed to addresses and sizes. So its inputs lie in a buffer that every pass
refills, and sizes are rounded up: what a pass lacks is filled with tokens of no slot and of weight zero,
which change no sum. A pass is recorded when its like comes for the second time, and a few recordings are
kept. What is not recorded, or cannot be, is computed with the same padding: a pass has the same bits whatever
came before it. All of this is decided without a GPU; `record_on_gpu` alone needs one.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from sys import maxsize
from typing import Any, Generic, TypeVar

import torch

from fedllm.models.files import first_line

MOST_COUNTED = 4096  # kinds of passes, as a long run may have more and more
MOST_KEPT = 16  # they share their memory: all of them need what the largest does

B = TypeVar("B")
T = TypeVar("T")

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
    clients: int  # runs of neighbouring tokens of one client
    slots: int


def num_padding(needs: Sizes, room: Sizes) -> int:
    """Return how many sequences hold the padding: each has a query, and no fewer keys than queries."""
    queries, keys = room.tokens - needs.tokens, room.keys - needs.keys
    return max(-(-queries // room.longest_queries), -(-keys // room.longest_keys))


def rounded_up(needs: Sizes) -> Sizes:
    """Return the sizes of a recording for a pass and others like it.

    About 1/8 more tokens at most and 1/4 more logits, half of that in the mean; what costs next to nothing is
    doubled at most. Finer steps would waste less, but then the passes of a training have so many sizes that a
    third of them come too seldom to be replayed.
    """
    longest_keys, shared_keys = rounded(needs.longest_keys, 1), needs.keys - needs.tokens
    more_keys = rounded(shared_keys, 4)
    # Keys that fill up need queries which see them: two for every sequence of such keys are always enough.
    tokens = rounded(needs.tokens + 2 * -(-(more_keys - shared_keys) // longest_keys), 8)
    room = Sizes(
        tokens,
        tokens + more_keys,
        needs.sequences,
        rounded(needs.longest_queries, 1),
        longest_keys,
        rounded(needs.supervised, 4),
        rounded(needs.samples, 2),
        rounded(needs.clients, 2),
        needs.slots,  # as many as the bank has rows of gradients
    )
    return replace(room, sequences=rounded(needs.sequences + num_padding(needs, room), 2))


def rounded(number: int, steps: int) -> int:
    """Return the next of the numbers that part every span between two powers of two into `steps`."""
    step = max(1, (1 << max(0, number - 1).bit_length()) // (2 * steps))
    return -(-number // step) * step


@dataclass(frozen=True, eq=False)
class Recording(Generic[B]):
    """A recorded pass: what is written to `inputs` is what `replay` computes with."""

    inputs: B
    replay: Replay


class Shelf(Generic[B]):
    """The recordings that are kept, and how often each kind of pass was seen.

    They share memory: what a replay returns must be used, or copied, before the next one.
    """

    def __init__(self, record: Recorder, most_kept: int = MOST_KEPT):
        self._record = record
        self._most_kept = most_kept
        self._kept: OrderedDict[tuple[Hashable, Sizes], Recording[B]] = OrderedDict()  # the last used last
        self._uses: Counter[tuple[Hashable, Sizes]] = Counter()
        self._refused_from = maxsize  # tokens of a pass that could not be recorded
        self.surroundings: Hashable = None  # what recordings of now depend on, whatever their kind

    def find(
        self,
        kind: Hashable,
        sizes: Sizes,
        make_inputs: Callable[[], B],
        run: Callable[[B], torch.Tensor],
        changed: torch.Tensor,
    ) -> Recording[B] | None:
        """Return the recording of passes of this kind and these sizes, made now if it is due, else None.

        `kind` is all else that must be equal, addresses included. `run` is the pass; it adds to `changed`,
        which keeps its values until the recording is replayed.
        """
        key = (self.surroundings, kind), sizes
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if len(self._uses) >= MOST_COUNTED:
            self._uses.clear()
        self._uses[key] += 1
        if sizes.tokens >= self._refused_from or self._uses[key] < 2:
            return None
        if all(kept.tokens < sizes.tokens for _, kept in self._kept):
            # The largest must come first: smaller ones fit into its memory, but not the other way round.
            self.clear()
        recording = self._recording(sizes, make_inputs(), run, changed)
        if recording is not None:
            self._kept[key] = recording
            if len(self._kept) > self._most_kept:
                dropped, _ = self._kept.popitem(last=False)
                del self._uses[dropped]  # so that many kinds in turn are not recorded every time
        return recording

    @property
    def num_kept(self) -> int:
        """How many recordings are kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget all recordings, so that their memory is free."""
        self._kept.clear()

    def _recording(
        self, sizes: Sizes, inputs: B, run: Callable[[B], torch.Tensor], changed: torch.Tensor
    ) -> Recording[B] | None:
        """Return a new recording, or None where it cannot be made.

        From then on none is made, or none as large where only memory was short.
        """
        before, failure = changed.clone(), ""
        shares = next((kept.replay for kept in self._kept.values()), None)
        try:
            replay = self._record(lambda: run(inputs), shares)
        except torch.OutOfMemoryError:
            failure = f"those of {sizes.tokens} tokens do not fit into memory"
            self._refused_from = sizes.tokens
        except RuntimeError as error:  # torch's for a failed capture
            failure = first_line(error)
            self._refused_from = 0
        changed.copy_(before)  # recording runs the pass for real
        if not failure:
            return Recording(inputs, replay)
        self.clear()
        _logger.warning("passes cannot be recorded (%s): they are computed one kernel at a time", failure)
        return None


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
        stream, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(stream)
        try:
            with torch.cuda.stream(aside):  # what is made once, as compiled kernels, is no part of a graph
                run()
        finally:  # what was begun there still adds to its sums
            stream.wait_stream(aside)
    pool = shares.graph.pool() if isinstance(shares, GraphReplay) else None
    return GraphReplay(*captured(device, run, pool))


def captured(device: torch.device, run: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return the kernels that `run` launches as a CUDA graph, and its result, which they have yet to compute.

    Raises:
        RuntimeError: CUDA or a kernel refuses, or memory does not suffice.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        try:
            # Other threads of the process, which write checkpoints, say, may go on meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                return graph, run()
        finally:  # torch stays on the stream of a capture that failed
            torch.cuda.set_stream(stream)
