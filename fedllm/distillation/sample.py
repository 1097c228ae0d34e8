"""Synthetic text: what the clients' adapters write, each client as often as its prior says.

Ancestral sampling at temperature 1 draws from the distribution of a posterior teacher, sum_k prior_k p_k(y),
so the teacher knows the text that it is asked about. Many adapters write in one batch. Up to rounding a text
depends on the seed and its own number alone, not on who shares its batch.
Tensor suffixes: K adapter, P flat adapter, B row of a batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.engine import Engine
from fedllm.engine.reading import rows_at_once
from fedllm.errors import ConfigError, LayoutError, NoDataError, NonFiniteError
from fedllm.models.chat import IGNORED, Encoded
from fedllm.seeds import derive_seed


@dataclass(frozen=True)
class Samples:
    """Texts, and for each the place of the adapter that wrote it and of the prompt that it continues."""

    rows: tuple[Encoded, ...]
    writers: tuple[int, ...]
    prompts: tuple[int, ...]


def sample_texts(
    engine: Engine,
    adapters: Sequence[torch.Tensor],
    priors: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    number: int,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int,
    layout: AdapterLayout | None = None,
    at_once: int = 0,
) -> Samples:
    """Return `number` texts, each by a writer drawn by its prior [K] after a prompt drawn evenly.

    A text has at most `max_tokens` new tokens; an end token ends it and is part of it. `prompts` are
    beginnings of at least one token each; only what follows them is learnt. `adapters` [P] are of the
    engine's layout, or of `layout`. An adapter that is not finite writes nothing: the others take its share.
    Texts of an adapter that computes numbers that are not finite are left out. `at_once` of them share a
    batch (0 = 32 on a CPU, on a GPU as many as its memory holds).

    Raises:
        ConfigError: the temperature is not above 0, or number or length is below 1.
        LayoutError: an adapter does not fit the layout, or has no prior.
        NoDataError: there is no prompt, or an empty one.
        NonFiniteError: no adapter is finite, or all texts were left out.
    """
    layout = layout or engine.layout
    if not (temperature > 0 and number >= 1 and max_tokens >= 1):
        raise ConfigError("sampling needs a temperature above 0 and at least one text of one token")
    if len(priors) != len(adapters) or any(vector.shape != (layout.size,) for vector in adapters):
        raise LayoutError(f"sampling needs adapters of {layout.size} values each, with one prior each")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise NoDataError("sampling needs prompts of at least one token; a start token will do")
    shares = _shares(adapters, priors, engine.base.dtype)
    drawn = [np.random.Generator(np.random.PCG64(derive_seed(seed, "text", n))) for n in range(number)]
    writers = [int(generator.choice(len(shares), p=shares)) for generator in drawn]
    which = [int(generator.integers(len(prompts))) for generator in drawn]
    rows: dict[int, Encoded] = {}
    # Neighbours in length share a batch, for less padding.
    order = sorted(range(number), key=lambda n: (len(prompts[which[n]]), writers[n]))
    at_once = at_once or rows_at_once(engine.base, max(map(len, prompts)) + max_tokens)
    for begin in range(0, number, at_once):
        batch = order[begin : begin + at_once]
        beginnings = [tuple(prompts[which[n]]) for n in batch]
        choose = NextTokens([drawn[n] for n in batch], max_tokens, temperature, engine.base.device)
        vectors = [adapters[writers[n]] for n in batch]
        continued = engine.continue_rows(layout, vectors, beginnings, max_tokens, choose)
        lost_at = choose.lost_at_B.tolist()
        for n, beginning, text, lost in zip(batch, beginnings, continued, lost_at, strict=True):
            if lost >= len(text):
                rows[n] = Encoded(beginning + text, (IGNORED,) * len(beginning) + text)
    kept = sorted(rows)
    if not kept:
        raise NonFiniteError("sampling: no client's adapter gives finite numbers, so there is no text")
    return Samples(
        tuple(rows[n] for n in kept), tuple(writers[n] for n in kept), tuple(which[n] for n in kept)
    )


def _shares(adapters: Sequence[torch.Tensor], priors: torch.Tensor, dtype: torch.dtype) -> list[float]:
    """Return the priors of the finite adapters, as shares of 1."""
    sound_K = torch.tensor([bool(vector.to(dtype).isfinite().all()) for vector in adapters])
    shares_K = priors.double() * sound_K
    if not bool(shares_K.sum() > 0):
        raise NonFiniteError("sampling: no client's adapter is finite, so there is nobody to write")
    shares: list[float] = (shares_K / shares_K.sum()).tolist()
    return shares


class NextTokens:
    """Draws the next token of every row from its distribution, by random numbers of the row's own.

    `lost_at_B` is the step at which a row first had no finite distribution, and `max_tokens` where it always
    had one; it goes on with an even one.
    """

    def __init__(
        self,
        generators: Sequence[np.random.Generator],
        max_tokens: int,
        temperature: float,
        device: torch.device,
    ):
        # Drawn beforehand, row by row: a generator is never shared, so neighbours change nothing.
        drawn_BS = np.stack([generator.random(max_tokens) for generator in generators])
        self._drawn_BS = torch.from_numpy(drawn_BS).to(device)
        self._temperature = temperature
        self.lost_at_B = torch.full((len(generators),), max_tokens, device=device)

    def __call__(self, rows: range, step_1: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the tokens [B]; row b takes the first token at which the sum of probabilities passes u_b."""
        batch = slice(rows.start, rows.stop)
        probs_BV = (logits_BV.double() / self._temperature).softmax(dim=1)
        finite_B = probs_BV.isfinite().all(dim=1)
        lost_at_B = self.lost_at_B[batch]
        lost_at_B.copy_(torch.where(finite_B, lost_at_B, lost_at_B.minimum(step_1)))
        sums_BV = torch.where(finite_B[:, None], probs_BV, 1.0).cumsum(dim=1)
        u_B1 = self._drawn_BS[batch].index_select(1, step_1)
        places_B1 = torch.searchsorted(sums_BV, u_B1 * sums_BV[:, -1:], right=True)
        return places_B1[:, 0].clamp(max=probs_BV.shape[1] - 1)  # where rounding left u at the very end
