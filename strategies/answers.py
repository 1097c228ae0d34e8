"""Clients' answers on their way to the aggregate: how many are waited for, and in which order they count."""

from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import chain
from typing import TypeAlias

from fedllm.types import ClientFailure, ClientUpdate

Answer: TypeAlias = ClientUpdate | ClientFailure


def first_updates(answers: Generator[Answer, None, None], number: int) -> Generator[Answer, None, None]:
    """Stop listening once `number` updates have come; the rest of an over-selected cohort is let go."""
    with closing(answers):
        for answer in answers:
            yield answer
            number -= isinstance(answer, ClientUpdate)
            if number == 0:
                return


def in_order(answers: Iterable[Answer], order: Iterable[str]) -> Generator[Answer, None, None]:
    """Yield answers in the plan's order, each as soon as all before it are there; late ones by name, last.

    Floating-point sums depend on their order; this makes a round independent of who was faster.
    """
    held: dict[str, Answer] = {}
    waiting = iter(order)
    current = next(waiting, None)
    for answer in answers:
        held[answer.client_id] = answer
        while current in held:
            yield held.pop(current)
            current = next(waiting, None)
    for client in chain([current], waiting):
        if client in held:
            yield held.pop(client)
    yield from (held[client] for client in sorted(held))
