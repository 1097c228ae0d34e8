"""Is synthetic text closer to the training text than unseen real text is?

No gate of a run: whoever measures it holds both the private and the synthetic text. Between a server and data
holders it has no form that would not show the text that one holder's adapter wrote to another.
Distance to the closest record (DCR) between texts as mean-pooled hidden states of the frozen base model, so
no further model is needed. Tensor suffixes: N texts asked about, M reference texts, D feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.engine.engine import Engine
from fedllm.models.chat import Encoded

TOO_CLOSE = 0.01  # share of held-out texts that are closer than what is refused


@dataclass(frozen=True)
class DistanceRatio:
    """Median DCR of synthetic over that of held-out text, with a bootstrap interval."""

    ratio: float
    low: float
    high: float

    @property
    def is_original(self) -> bool:
        """Whether the data allow a ratio of 1: no closer to the training text than unseen real text."""
        return self.high >= 1


@torch.inference_mode()
def mean_pooled(engine: Engine, rows: Sequence[Encoded]) -> torch.Tensor:
    """Return the mean over tokens of the base model's last hidden states, [N, D] float32 on the CPU."""
    decoder, device = engine.base.model.get_decoder(), engine.base.device
    states = [
        decoder(input_ids=torch.tensor([row.tokens], device=device), use_cache=False).last_hidden_state[0]
        for row in rows
    ]
    return torch.stack([states_TD.float().mean(dim=0).cpu() for states_TD in states])


def closest(asked_ND: torch.Tensor, reference_MD: torch.Tensor) -> torch.Tensor:
    """Return of every text the distance to the closest reference, [N].

    Features are first put on the reference's own scale: the hidden states of language models have a few
    features that would otherwise drown all others.
    """
    mean_D = reference_MD.double().mean(dim=0)
    scale_D = reference_MD.double().std(dim=0, correction=0).clamp(min=1e-6)
    asked, reference = ((values.double() - mean_D) / scale_D for values in (asked_ND, reference_MD))
    # The plain difference: the faster product form loses what distinguishes a copy, a distance of zero.
    return torch.cdist(asked, reference, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values


def distance_ratio(
    synthetic_N: torch.Tensor,
    held_out_N: torch.Tensor,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> DistanceRatio:
    """Return median DCR(synthetic to train) / median DCR(held-out to train) and its percentile interval.

    Both sets of distances are resampled with replacement (Efron 1979).

    Raises:
        ValueError: a set is empty.
    """
    if not len(synthetic_N) or not len(held_out_N):
        raise ValueError("a distance ratio needs distances of synthetic and of held-out texts")
    generator = torch.Generator().manual_seed(seed)

    def medians(values_N: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(len(values_N), (num_resamples, len(values_N)), generator=generator)
        return values_N[drawn].median(dim=1).values

    ratios = (medians(synthetic_N) / medians(held_out_N).clamp(min=1e-12)).sort().values
    miss = (1 - confidence) / 2
    low, high = ratios.quantile(torch.tensor([miss, 1 - miss], dtype=ratios.dtype)).tolist()
    middle = synthetic_N.median() / held_out_N.median().clamp(min=1e-12)
    return DistanceRatio(float(middle), low, high)


def too_close(
    synthetic_N: torch.Tensor, held_out_N: torch.Tensor, share: float = TOO_CLOSE
) -> tuple[bool, ...]:
    """Return which texts are closer to the training text than all but `share` of the held-out texts.

    For whoever holds both texts: no run asks it.
    """
    return tuple((synthetic_N < held_out_N.quantile(share)).tolist())
