"""Canaries: texts of random tokens that a client trains on or not, by a fair coin for each.

Since only the coins differ, what a model has learnt of its training text can be counted: included canaries
against those that stayed out. Their tokens come from the ordinary vocabulary, so any two are alike to a model
that has seen neither (The Secret Sharer, arXiv 1802.08232).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.attacks.token_scores import whole
from fedllm.config.keys import AuditConfig
from fedllm.models.chat import Encoded
from fedllm.plan.dealt_numbers import CANARY_TOKENS, parse_canaries
from fedllm.privacy.keys import derived_key
from fedllm.seeds import derive_seed

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
    # Two streams, so that the coins stay the same whatever the length of the texts.
    tokens = _stream(seed, "canary-tokens", client_id).integers(len(vocabulary), size=(number, length))
    coins = _stream(seed, "canary-coins", client_id).integers(2, size=number)
    return tuple(
        Canary(client_id, tuple(int(vocabulary[i]) for i in row), bool(coin), repeats[place % len(repeats)])
        for place, (row, coin) in enumerate(zip(tokens, coins, strict=True))
    )


def secret_canaries(
    section: AuditConfig, tokenizer: Any, *, client_id: str, secret: bytes
) -> tuple[Canary, ...]:
    """Return the canaries of one client of a run, none where the run plants none.

    Tokens and coins come from `secret`, never from the run's seed: that is published, and who can draw the
    coins again has no need of an attack.
    """
    number, repeats = parse_canaries(section.canaries)
    if not number:
        return ()
    return draw_canaries(
        plain_vocabulary(tokenizer),
        client_id=client_id,
        number=number,
        length=CANARY_TOKENS,
        seed=int.from_bytes(derived_key(secret, "canaries")[:8], "big") >> 1,  # 63 bits, as all seeds
        repeats=repeats,
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
