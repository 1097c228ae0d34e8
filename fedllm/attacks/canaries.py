"""Random-token texts that each client includes or not by a fair coin, so that what is learnt can be counted.

A canary's tokens are drawn from the ordinary vocabulary, so that none says anything and any two are alike to
a model that has seen neither (The Secret Sharer, arXiv 1802.08232). Those that stayed out are the control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm.attacks.extraction import exposure
from fedllm.attacks.one_run import Guesses, guess
from fedllm.attacks.token_scores import whole
from fedllm.models.chat import Encoded
from fedllm.plan.dealt_numbers import parse_repeats
from fedllm.privacy.keys import derived_key
from fedllm.seeds import derive_seed

if TYPE_CHECKING:
    from fedllm.config.keys import AuditConfig

REPEATS = (1, 4, 16, 64)  # how often an included canary stands among a client's rows


@dataclass(frozen=True)
class Canary:
    """One text of random tokens; `included` is its coin, `repeats` how often it is trained on if so."""

    client_id: str
    tokens: tuple[int, ...]
    included: bool
    repeats: int


def draw_canaries(
    vocabulary: Sequence[int],
    *,
    client_id: str,
    number: int,
    length: int,
    seed: int,
    repeats: Sequence[int] = REPEATS,
) -> tuple[Canary, ...]:
    """Return `number` canaries of one client, of `length` tokens each, the repeats dealt in turn.

    `vocabulary` has the ids to draw from, special tokens left out. Tokens and coins are streams of the seed
    and the client, apart from each other and from all that trains.

    Raises:
        ValueError: there is nothing to draw, or nothing to draw from.
    """
    if not vocabulary or min(number, length) < 1 or min(repeats, default=0) < 1:
        raise ValueError("canaries need a vocabulary, a number, a length and repeats of at least 1")
    tokens = _stream(seed, "canary-tokens", client_id).integers(len(vocabulary), size=(number, length))
    coins = _stream(seed, "canary-coins", client_id).integers(2, size=number)
    return tuple(
        Canary(client_id, tuple(int(vocabulary[i]) for i in row), bool(coin), repeats[place % len(repeats)])
        for place, (row, coin) in enumerate(zip(tokens, coins, strict=True))
    )


def secret_canaries(
    section: "AuditConfig", tokenizer: Any, *, client_id: str, secret: bytes
) -> tuple[Canary, ...]:
    """Return the canaries of one client of a run, none where the run plants none.

    Tokens and coins come from `secret`, never from the run's seed, which is published: whoever could draw the
    coins again would know what an attack is to find out.
    """
    if not section.canaries:
        return ()
    return draw_canaries(
        plain_vocabulary(tokenizer),
        client_id=client_id,
        number=section.canaries,
        length=section.canary_tokens,
        seed=int.from_bytes(derived_key(secret, "canaries")[:8], "big") >> 1,
        repeats=parse_repeats(section.canary_repeats),
    )


def plain_vocabulary(tokenizer: Any) -> list[int]:
    """Return the ids of a tokenizer's ordinary tokens, sorted."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(set(tokenizer.get_vocab().values()) - special)


def _stream(seed: int, name: str, client_id: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed(seed, name, client_id)))


def canary_rows(canaries: Sequence[Canary]) -> tuple[Encoded, ...]:
    """Return the rows that a client adds to its own: every included canary as often as it is repeated."""
    return tuple(whole(one.tokens) for one in canaries for _ in range(one.repeats) if one.included)


def exposures(canaries: Sequence[Canary], losses: Sequence[float]) -> Mapping[int, tuple[float, ...]]:
    """Return the exposures of the included canaries by how often they were repeated.

    `losses` has that of every canary under the model that is audited. Each included canary is ranked among
    all that stayed out.
    """
    pairs = list(zip(canaries, losses, strict=True))
    others = [loss for one, loss in pairs if not one.included]
    found: dict[int, list[float]] = {}
    for one, loss in pairs:
        if one.included:
            found.setdefault(one.repeats, []).append(exposure(loss, others))
    return {number: tuple(found[number]) for number in sorted(found)}


def guesses_of(
    canaries: Sequence[Canary], losses: Sequence[float], base_losses: Sequence[float], share: float = 1.0
) -> Guesses:
    """Return the auditor's guesses from how much lower each loss is than under the base model.

    Half of `share` of the canaries are guessed in, half out.
    """
    scores = [base - loss for loss, base in zip(losses, base_losses, strict=True)]
    each = int(share * len(canaries)) // 2
    return guess(scores, [one.included for one in canaries], num_in=each, num_out=each)
