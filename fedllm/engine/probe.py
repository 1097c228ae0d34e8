"""What an architecture can do, found out by trying it rather than by its name.

Whether it is causal, whether it keeps many samples of one flat row apart, and whether its head is a plain
product.
"""

from collections.abc import Callable, Sequence
from functools import partial
from sys import maxsize
from typing import Any

import torch
from torch import nn

from fedllm.engine.flat_row import SHORTEST_SHARED, lay_out, token_losses
from fedllm.engine.head import Head
from fedllm.errors import ModelError
from fedllm.models.attention import attends_by_interface, ragged
from fedllm.models.base import not_causal
from fedllm.models.chat import Encoded

_OWNERS = (0, 1, 1, 2)  # of the rows that are tried together

# Rounding in units of the dtype's own precision, relative to 1 + the value. Kernels differ by up to 100 units
# in 30 layers; one kernel at one size by none, but for experts, whose numbers of tokens differ.
_OTHER_KERNEL, _SAME_SIZE = 1024, 8
_HALF = 2e-2  # of the norm, where a base of 16 bits or fewer hides all that is smaller
_NOT_CAUSAL = 1e-4  # of the norm in float32: a hundred times rounding, a tenth of what an untrained BERT does


def check_causal(model: Any, device: torch.device) -> None:
    """Refuse a model whose token sees those after it: its loss on an answer would be of what it was shown.

    Raises:
        ModelError: what it computes of a row changes with the row's last token.
    """
    tokens = list(_tokens(model, 8, 0))
    last = torch.tensor([tokens, [*tokens[:-1], (tokens[-1] + 1) % _vocabulary(model)]], device=device)
    with torch.no_grad():
        # One by one, since nothing is known of the model yet.
        before, after = (model(input_ids=row[None], use_cache=False).logits[0, :-1].float() for row in last)
    bound = _HALF if model.dtype.itemsize < 4 else _NOT_CAUSAL
    if bool((before - after).norm() > bound * before.norm()):
        raise not_causal(model)


@torch.no_grad()
def can_be_ragged(model: Any, device: torch.device) -> bool:
    """Return whether many samples in one flat row, their common prefix once, give each sample's own losses.

    False for models that do not use transformers' attention interface, or do more in it than ours
    (soft-capped scores, sinks), or pass on state from token to token (convolutions, recurrences): the engine
    then feeds them one sample at a time.
    """
    if not attends_by_interface(model):
        return False

    def token_losses_of(rows: Sequence[Encoded]) -> Sequence[torch.Tensor]:
        losses = _losses(model, rows, device, Head(), _OWNERS)
        return torch.split(losses, [len(row.tokens) - 1 for row in rows])

    rows = neighbours(model)
    alone = [_losses(model, [row], device, Head()) for row in rows]
    try:
        with ragged(model):
            together = token_losses_of(rows)
            is_right = all(map(partial(_agree, model), alone, together))
            return is_right and keeps_apart(token_losses_of, model, together)
    except (RuntimeError, TypeError, ValueError):  # our kernel refuses, or a layer of the model does
        return False


def keeps_apart(
    results_of: Callable[[Sequence[Encoded]], Sequence[torch.Tensor]],
    model: Any,
    before: Sequence[torch.Tensor] | None = None,
) -> bool:
    """Return whether what is computed of a row stays as it is whatever rows lie before and after it.

    `results_of` gives one tensor for each of the rows that share its passes, `before` what it gives for
    `neighbours(model)`, if that is known. Sizes stay, so the same kernels run and rounding stays too, in any
    dtype.
    """
    rows, others = neighbours(model), neighbours(model, seed=1)
    before = before or results_of(rows)
    for kept in (0, 1):  # the even rows, then the odd ones: every neighbour changes once, on both sides
        places = range(kept, len(rows), 2)
        after = results_of([row if place in places else others[place] for place, row in enumerate(rows)])
        if not all(_same(before[place], after[place]) for place in places):
            return False
    return True


def neighbours(model: Any, seed: int = 0) -> list[Encoded]:
    """Return rows of pseudo-random tokens, all learnt, for `_OWNERS`: two of one owner between two others.

    Another seed gives other tokens in the same number, but for what the two begin with alike.
    """
    common = _tokens(model, SHORTEST_SHARED, 0)  # so that sharing it is tried too
    beginnings = ((), common, common, ())
    rows = [
        begin + _tokens(model, 4 + 3 * place, 1 + place + 10 * seed) for place, begin in enumerate(beginnings)
    ]
    return [Encoded(row, row) for row in rows]


def mixes_examples(model: Any) -> ModelError:
    """Return the error for a model under which no example of a private run would be alone."""
    kind = type(model).__name__
    return ModelError(f"model.name: {kind} mixes examples, so none can be private; take another model")


def longest_pass(model: Any) -> int:
    """Return how many tokens rows may share a pass up to, as far as their positions go.

    Some rotations stretch with the longest row of a pass, once that is longer than what was learnt first.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in {"dynamic", "longrope"}:
        return maxsize
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


@torch.no_grad()
def plain_head(model: Any, device: torch.device) -> Head:
    """Return the output layer if it alone makes logits of hidden states, else `Head()`."""
    layer, decoder = model.get_output_embeddings(), model.get_decoder()
    if type(layer) is not nn.Linear or decoder is model or decoder is layer:
        return Head()
    settings = vars(model.config.get_text_config()).items()
    changes = (value for name, value in settings if "logit" in name and not isinstance(value, bool))
    if any(value not in (None, 1, 1.0) for value in changes):
        return Head()  # scaled or capped, say: small logits hide a cap from the comparison below
    row, head = neighbours(model)[1], Head(layer.weight, layer.bias)
    is_plain = _agree(model, _losses(model, [row], device, Head()), _losses(model, [row], device, head))
    return head if is_plain else Head()


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _tokens(model: Any, length: int, seed: int) -> tuple[int, ...]:
    size = _vocabulary(model)
    return tuple((7919 * (index + 131 * seed) + 13) % size for index in range(length))


def _losses(
    model: Any, rows: Sequence[Encoded], device: torch.device, head: Head, owners: Sequence[int] = ()
) -> torch.Tensor:
    flat = lay_out(rows, device, owners)
    weights = torch.ones(len(flat.targets_N), device=device)
    return token_losses(model, flat, head, weights)[1]


def _agree(model: Any, expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Return whether two ways to compute losses give the same, up to the rounding of the model's dtype."""
    if model.dtype.itemsize < 4:
        return bool((expected - found).norm() <= _HALF * expected.norm())
    return _within(_OTHER_KERNEL, expected, found)


def _same(before: torch.Tensor, after: torch.Tensor) -> bool:
    return _within(_SAME_SIZE, before, after)


def _within(units: int, expected: torch.Tensor, found: torch.Tensor) -> bool:
    bound = units * torch.finfo(expected.dtype).eps * (1 + expected.abs())
    return bool(((expected - found).abs() <= bound).all())
