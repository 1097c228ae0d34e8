"""A task: questions or texts of one kind, and the figures by which adapters are compared on it.

choice  the likelihood of each choice after the prompt; the largest is the model's answer
number  the model writes an answer; the number in it is compared with the right one
text    the likelihood of every token of a text, or of the answers of a conversation
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.data.fields import Example

KINDS = ("choice", "number", "text")


@dataclass(frozen=True)
class Item:
    """One question or text.

    `prompt` is what the model is given: the turns before the answer, or the beginning of a plain text. In a
    task of texts it is the whole example.
    """

    prompt: Example
    choices: tuple[str, ...] = ()
    right: int = 0  # the place of the right choice
    number: str = ""  # the right number, as `numbers.final_number` writes it


@dataclass(frozen=True)
class Task:
    """Items of one kind under a name."""

    name: str
    kind: str  # one of KINDS
    items: tuple[Item, ...]

    @property
    def chance(self) -> float | None:
        """The share of right answers by guessing; None where nothing is chosen."""
        if self.kind != "choice":
            return None
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    @property
    def best_constant(self) -> float | None:
        """The share of right answers of who always gives the same one; None of texts."""
        if self.kind == "text":
            return None
        answers = Counter(item.number or str(item.right) for item in self.items)
        return max(answers.values()) / len(self.items)


@dataclass(frozen=True)
class Ratio:
    """A figure that is a sum over items divided by another: right answers by items, nats by tokens."""

    tops: Sequence[float]
    bottoms: Sequence[float]

    @property
    def value(self) -> float:
        """The figure over all items."""
        return sum(self.tops) / sum(self.bottoms)


@dataclass(frozen=True)
class Scores:
    """What one adapter gave on a task: its figures by name, and what it wrote for each item, if anything."""

    figures: Mapping[str, Ratio]
    generations: tuple[str, ...] = field(default=())


def share(flags: Sequence[bool]) -> Ratio:
    """Return the share of items for which something holds."""
    return Ratio([float(flag) for flag in flags], [1.0] * len(flags))
