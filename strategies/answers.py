"""Clients' answers on their way to the aggregate: how many are waited for, and in which order they count."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import chain
from typing import TypeAlias

from fedllm.types import ClientFailure, ClientUpdate

Answer: TypeAlias = ClientUpdate | ClientFailure


def members_of(answer: Answer) -> Sequence[Answer]:
    """Return the answer of every client that an answer stands for: the members of a sum, else itself."""
    return (isinstance(answer, ClientUpdate) and answer.members) or (answer,)


def first_updates(answers: Generator[Answer, None, None], number: int) -> Generator[Answer, None, None]:
    """Stop listening once `number` updates have come; the rest of an over-selected cohort is let go."""
    with closing(answers):
        for answer in answers:
            yield answer
            number -= len(members_of(answer)) if isinstance(answer, ClientUpdate) else 0
            if number <= 0:
                return


def in_order(answers: Iterable[Answer], order: Iterable[str]) -> Generator[Answer, None, None]:
    """Yield answers in the plan's order, each as soon as all before it are there; late ones by name, last.

    Floating-point sums depend on their order; this makes a round independent of who was faster.
    """
    held: dict[str, Answer | None] = {}
    waiting = iter(order)
    current = next(waiting, None)
    for answer in answers:
        held.update(dict.fromkeys((member.client_id for member in members_of(answer)), None))
        held[answer.client_id] = answer  # a sum comes at the place of its first member
        while current in held:
            ready = held.pop(current)
            if ready is not None:
                yield ready
            current = next(waiting, None)
    for client in [*chain([current], waiting), *sorted(held)]:
        ready = held.pop(client, None) if client is not None else None
        if ready is not None:
            yield ready
