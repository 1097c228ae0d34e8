"""How long a phase of a round waits for its replies, where that follows from times measured before."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median

FIRST_SECONDS = 600.0  # before any node has answered
# Flower needs up to 60 s to notice a process that has died, and to start one for a message
LEAST_SECONDS, MOST_SECONDS = 60.0, 3600.0
MEDIANS, MOST_MEDIANS = 2.0, 4.0
SLOWEST = 1.5


@dataclass(eq=False)
class MeasuredTimes:
    """How long each node took for its last answer, by message type ("train", "evaluate").

    A few nodes that answer at once or never move the median little. A node up to 4 times slower than the
    median is waited for once its first late answer has told how slow it is.
    """

    answered: dict[str, dict[int, float]] = field(default_factory=dict)  # seconds
    missed: dict[str, dict[int, float]] = field(default_factory=dict)  # seconds it was waited for in vain

    def note(self, message_type: str, node: int, seconds: float) -> None:
        """Note an answer, in time or late."""
        self.missed.get(message_type, {}).pop(node, None)
        self.answered.setdefault(message_type, {})[node] = seconds

    def note_missed(self, message_type: str, node: int, seconds: float) -> None:
        """Note that a node took longer than `seconds`: where most nodes do, the next deadline is longer."""
        self.answered.get(message_type, {}).pop(node, None)
        self.missed.setdefault(message_type, {})[node] = seconds

    def keep(self, nodes: Collection[int]) -> None:
        """Forget all nodes but these."""
        for times in (*self.answered.values(), *self.missed.values()):
            for node in times.keys() - set(nodes):
                del times[node]

    def deadline(self, message_type: str) -> float:
        """Return the seconds to wait: twice the median, or more for the slowest node, from 60 to 3,600."""
        answered = self.answered.get(message_type, {}).values()
        times = [*answered, *self.missed.get(message_type, {}).values()]
        if not times:
            return FIRST_SECONDS
        middle = median(times)
        slowest = SLOWEST * max(answered, default=0.0)
        seconds = max(MEDIANS * middle, min(slowest, MOST_MEDIANS * middle))
        return float(math.ceil(min(MOST_SECONDS, max(LEAST_SECONDS, seconds))))
