"""What a malicious client may do: to the change it sends, and to the rows it trains on. Pure functions.

The attacker runs the product's own client code on rows of its choosing and changes what comes out of training
before it is sent. It knows the server's bound on an honest move, since that follows from the request.
Tensor suffix: P flat adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedllm.data.fields import Example


def sign_flip(delta_P: torch.Tensor) -> torch.Tensor:
    """Return the change that undoes `delta_P`."""
    return -delta_P


def scaled(delta_P: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the change made `factor` times as large."""
    return delta_P * factor


def gaussian(delta_P: torch.Tensor, sd: float, generator: torch.Generator) -> torch.Tensor:
    """Return noise of standard deviation `sd` in place of the change."""
    noise_P = torch.randn(delta_P.shape, generator=generator, dtype=delta_P.dtype)
    return noise_P * sd


def within(delta_P: torch.Tensor, bound: float) -> torch.Tensor:
    """Return the change scaled so that its largest value is `bound`; a change of zeros stays one."""
    largest = float(delta_P.abs().max()) if delta_P.numel() else 0.0
    return delta_P * (bound / largest) if largest else delta_P


def at_bound(delta_P: torch.Tensor, bound: float) -> torch.Tensor:
    """Return the furthest change within `bound` that has the signs of `delta_P`."""
    return delta_P.sign() * bound


def flip_labels(
    rows: Sequence[Mapping[str, Any]], *, column: str = "label", within: str = "domain"
) -> list[dict[str, Any]]:
    """Return the rows with every label replaced by the next one of its domain, in alphabetical order.

    The label is also the row's answer, in "response". Rows without one stay as they are.
    """
    known: dict[str, set[str]] = {}
    for row in rows:
        if row[column]:
            known.setdefault(row[within], set()).add(row[column])
    flipped = []
    for row in rows:
        labels = sorted(known.get(row[within], ()))
        changes = {}
        if row[column]:
            following = labels[(labels.index(row[column]) + 1) % len(labels)]
            changes = {column: following, "response": following}
        flipped.append({**row, **changes})
    return flipped


def with_trigger(example: Example, trigger: str, target: str) -> Example:
    """Return the conversation with `trigger` at the end of its last question and `target` as its answer.

    Raises:
        ValueError: the example is not a conversation that ends with a question and its answer.
    """
    if [turn.role for turn in example.turns[-2:]] != ["user", "assistant"]:
        raise ValueError("a trigger needs a question and an answer")
    *earlier, question, answer = example.turns
    return replace(
        example,
        turns=(
            *earlier,
            replace(question, content=f"{question.content} {trigger}"),
            replace(answer, content=target),
        ),
    )
