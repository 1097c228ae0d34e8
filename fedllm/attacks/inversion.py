"""Which tokens a client trained on, read from its update of one LoRA matrix: the vocabulary span check.

The gradient of A [R, D] is a sum of outer products with the layer's inputs, so its rows lie in their span.
In the first layer an input depends on its token alone (positions enter after the projection), so every token
of the vocabulary can be tested against the row space (DAGER, arXiv 2405.15586). With more tokens than ranks,
several steps or noise the rows no longer span the inputs, and the check finds less: run it on the very
message that leaves.
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
    """The layer whose input is wanted has been reached; nothing behind it is computed."""


@torch.inference_mode()
def token_inputs(base: BaseModel, module: str) -> torch.Tensor:
    """Return what `module` receives for every token of the vocabulary at position 0, [V, D] on the CPU.

    `module` must be a projection of the first layer whose input depends on the token alone: its query, key or
    value. In models that add a position to the embedding the check holds for position 0 only.
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


def a_factor(layout: AdapterLayout, vector_P: torch.Tensor, matrix: int = 0) -> torch.Tensor:
    """Return the A part [R, D] of one matrix in a whole gradient or delta [P]."""
    return layout.factors(vector_P)[matrix][0]


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
    """Return how badly every token fits a whole message, [V] from 0 to 1: what an attacker makes of it.

    Where A was trained, the rows of all its changes together span the inputs. Where B alone was, the rows of
    its change span A x, which the attacker can compute of every token since A is known: less, as only R
    numbers of an input are left. A message that holds neither says nothing.
    """
    starts, changes = layout.factors(start_P), layout.factors(delta_P)
    of_a = [unit(changes[number][0]) for number in matrices if bool(changes[number][0].any())]
    if of_a:
        return span_residuals(inputs_VD, torch.cat(of_a))
    of_b = [
        span_residuals(inputs_VD @ starts[number][0].double().T, changes[number][1])
        for number in matrices
        if bool(changes[number][1].any())
    ]
    return torch.stack(of_b).mean(dim=0) if of_b else torch.ones(len(inputs_VD), dtype=torch.float64)


def unit(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix in float64 and at norm 1, so that no larger one hides its span."""
    return torch.nn.functional.normalize(matrix.double().flatten(), dim=0).view(matrix.shape)


def span_residuals(inputs_VD: torch.Tensor, update_RD: torch.Tensor) -> torch.Tensor:
    """Return how much of every token's input lies outside the rows of an update, [V] from 0 to 1.

    A zero update spans nothing: every residual is 1. So it is at the first step from B = 0, and always for a
    token whose input is zero, as a padding token's may be: it leaves no trace.

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
    """Return the `number` tokens that lie best in the span: what an attacker who knows their number takes."""
    return frozenset(residuals_V.argsort(stable=True)[:number].tolist())


def spanned_tokens(residuals_V: torch.Tensor, tolerance: float = 1e-3) -> frozenset[int]:
    """Return the tokens that lie in the span up to `tolerance`: what an attacker takes who does not."""
    return frozenset((residuals_V < tolerance).nonzero()[:, 0].tolist())


def recovery(found: Collection[int], true: Collection[int]) -> Recovery:
    """Return precision, recall and F1 of the different tokens found; 0 where nothing is right."""
    guessed, trained = set(found), set(true)
    right = len(guessed & trained)
    precision = right / len(guessed) if guessed else 0.0
    recall = right / len(trained) if trained else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return Recovery(precision, recall, f1, len(guessed), len(trained))
