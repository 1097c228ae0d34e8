"""Which tokens a client trained on, read from its update of one LoRA matrix: the vocabulary span check.

The gradient of A [R, D] is a sum of outer products with the layer's inputs, so its rows lie in their span.
In the first layer an input depends on its token alone (positions enter after the projection), so every token
of the vocabulary can be tested against the row space (DAGER, arXiv 2405.15586). With more tokens than ranks,
after several steps or under noise the rows no longer span the inputs and the check finds less. So run it on
the message that leaves the client, not on a gradient made for the test.
Tensor suffixes: R rank, D feature, V vocabulary.
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.models.base import BaseModel

SMALLEST = 1e-6  # singular values below this share of the largest are taken for rounding
BATCH = 1024  # tokens fed at a time
PROJECTIONS = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "query", "key", "value", "Wqkv"}
)  # what the architectures call them


@dataclass(frozen=True)
class Recovery:
    """How well the tokens found match those trained on, each counted once."""

    precision: float
    recall: float
    f1: float
    num_found: int
    num_true: int


class _Reached(Exception):
    """Ends a forward pass as soon as the wanted input has been seen."""


@torch.inference_mode()
def token_inputs(base: BaseModel, module: str) -> torch.Tensor:
    """Return what `module` receives for every token of the vocabulary at position 0, [V, D] on the CPU.

    `module` must be the query, key or value projection of the first layer: its input depends on the token
    alone. In models that add a position to the embedding the check holds for position 0 only.
    """
    size = base.model.get_input_embeddings().weight.shape[0]
    return torch.cat(
        [
            _inputs(base, module, torch.arange(begin, min(begin + BATCH, size), device=base.device))
            for begin in range(0, size, BATCH)
        ]
    )


def _inputs(base: BaseModel, module: str, tokens_V: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def catch(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _Reached

    handle = base.model.get_submodule(module).register_forward_pre_hook(catch)
    try:
        with suppress(_Reached):
            base.model(input_ids=tokens_V[:, None], use_cache=False)
    finally:
        handle.remove()
    return seen[0][:, 0].double().cpu()


def first_projections(layout: AdapterLayout) -> tuple[int, ...]:
    """Return which matrices of a layout project the input of the first layer; none if none is adapted.

    They are its query, key and value, or the one matrix of all three: all have the same input.
    """
    found: dict[int, list[int]] = {}
    for number, matrix in enumerate(layout.matrices):
        *path, name = matrix.module.split(".")
        depth = next((int(part) for part in path if part.isdecimal()), None)
        if name in PROJECTIONS and depth is not None:
            found.setdefault(depth, []).append(number)
    return tuple(found.get(0, ()))


def message_residuals(
    inputs_VD: torch.Tensor,
    layout: AdapterLayout,
    start_P: torch.Tensor,
    delta_P: torch.Tensor,
    matrices: Collection[int],
) -> torch.Tensor:
    """Return how badly every token fits a whole message, [V]: 0 it fits, 1 it does not at all.

    Where A was trained, the rows of all its changes together span the inputs x. Where B alone was, the rows
    of its change span A x, which an attacker who knows A computes for every token; it tells less, since A x
    has only R numbers. A message in which nothing changed fits no token.
    """
    starts, changes = layout.factors(start_P), layout.factors(delta_P)
    a_changes = [changes[number][0].double() for number in matrices if bool(changes[number][0].any())]
    if a_changes:
        # At norm 1 no matrix of large gradients hides the span of another.
        return span_residuals(inputs_VD, torch.cat([a_RD / a_RD.norm() for a_RD in a_changes]))
    b_residuals = [
        span_residuals(inputs_VD @ starts[number][0].double().T, changes[number][1])
        for number in matrices
        if bool(changes[number][1].any())
    ]
    if b_residuals:
        return torch.stack(b_residuals).mean(dim=0)
    return torch.ones(len(inputs_VD), dtype=torch.float64)


def span_residuals(inputs_VD: torch.Tensor, update_RD: torch.Tensor) -> torch.Tensor:
    """Return how much of every token's input lies outside the rows of an update, [V] from 0 to 1.

    A zero update spans nothing, so every residual is 1: A has no gradient at the first step from B = 0. A
    token with a zero input, such as padding, has residual 1 too, since it leaves no trace.

    Raises:
        ValueError: the update is not finite.
    """
    if not bool(torch.isfinite(update_RD).all()):
        raise ValueError("the update to invert holds NaN or infinity")
    _, values, rows_RD = torch.linalg.svd(update_RD.double(), full_matrices=False)
    basis_RD = rows_RD[values > SMALLEST * values[0]] if bool(values[0] > 0) else rows_RD[:0]
    outside_V = torch.cat(
        [
            torch.linalg.vector_norm(part_VD - (part_VD @ basis_RD.T) @ basis_RD, dim=1)
            for part_VD in torch.split(inputs_VD, BATCH)  # a vocabulary's inputs are large enough once
        ]
    )
    whole_V = torch.linalg.vector_norm(inputs_VD, dim=1)
    return torch.where(whole_V > 0, outside_V / whole_V, 1.0)


def closest_tokens(residuals_V: torch.Tensor, number: int) -> frozenset[int]:
    """Return the `number` tokens that lie best in the span: for an attacker who knows how many there are."""
    return frozenset(residuals_V.argsort(stable=True)[:number].tolist())


def spanned_tokens(residuals_V: torch.Tensor, tolerance: float = 1e-3) -> frozenset[int]:
    """Return the tokens that lie in the span up to `tolerance`: for an attacker who does not know."""
    return frozenset((residuals_V < tolerance).nonzero()[:, 0].tolist())


def recovery(found: Collection[int], true: Collection[int]) -> Recovery:
    """Return precision, recall and F1 of the different tokens found; 0 where nothing is right."""
    guessed, trained = set(found), set(true)
    right = len(guessed & trained)
    precision, recall = right / max(1, len(guessed)), right / max(1, len(trained))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return Recovery(precision, recall, f1, len(guessed), len(trained))
