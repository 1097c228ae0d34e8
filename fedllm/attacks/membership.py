"""Membership inference: was a text trained on, and how well does a signal tell members from others?

A signal is one number per text, larger where the text is more likely a member of the training set. Signals
are pure functions of `TokenScores`, which `fedllm.attacks.token_scores` computes.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedllm.attacks.binomial import clopper_pearson
from fedllm.attacks.token_scores import TokenScores

LOWEST = 0.2  # share of a text's tokens that Min-K% looks at
OUTLIER = 3.5  # modified z-score (Iglewicz and Hoaglin 1993)
LEAST_LEAD = 0.1  # nats per token below which no lead of one client is a sign


def likelihood(scores: TokenScores) -> float:
    """Return the mean log-probability: minus the loss (Yeom et al., arXiv 1709.01604)."""
    return float(scores.log_probs.mean())


def zlib_likelihood(scores: TokenScores, text: str) -> float:
    """Return the log-likelihood over the text's zlib length in bits (Carlini et al., arXiv 2012.07805).

    A text that compresses well is likely without having been seen.
    """
    return float(scores.log_probs.sum()) / (8 * len(zlib.compress(text.encode())))


def loss_ratio(scores: TokenScores, base: TokenScores) -> float:
    """Return minus the loss over the base model's loss of the same tokens (arXiv 2402.17012)."""
    return -likelihood(scores) / min(likelihood(base), -1e-12)  # a base that is sure has no loss to divide by


def min_k(scores: TokenScores, share: float = LOWEST) -> float:
    """Return the mean log-probability of the least likely tokens (Min-K%, arXiv 2310.16789)."""
    return _lowest_mean(scores.log_probs, share)


def min_k_plus_plus(scores: TokenScores, share: float = LOWEST) -> float:
    """Return the same with each log-probability standardised (Min-K%++, arXiv 2404.02936).

    Mean and deviation are those of a token that the model itself would draw there.
    """
    return _lowest_mean((scores.log_probs - scores.means) / scores.deviations.clamp(min=1e-12), share)


def _lowest_mean(values_N: torch.Tensor, share: float) -> float:
    number = max(1, int(share * len(values_N)))
    return float(values_N.sort().values[:number].mean())


SIGNALS: Mapping[str, Callable[[TokenScores, TokenScores, str], float]] = {
    "loss": lambda scores, base, text: likelihood(scores),
    "zlib": lambda scores, base, text: zlib_likelihood(scores, text),
    "loss-ratio": lambda scores, base, text: loss_ratio(scores, base),
    "min-k": lambda scores, base, text: min_k(scores),
    "min-k++": lambda scores, base, text: min_k_plus_plus(scores),
}  # each of (scores under the adapter, scores under the base, the text)


@dataclass(frozen=True)
class Separation:
    """How well a signal tells members from others.

    `caught` is the share of members above the threshold that at most `false_alarms` of the others pass. `low`
    and `high` are its Clopper-Pearson bounds for this threshold; they do not count how it would vary.
    """

    area: float  # under the ROC curve: 0.5 is chance, 1 perfect
    caught: float  # true positive rate
    low: float
    high: float
    false_alarms: float  # false positive rate allowed
    num_members: int
    num_others: int


def separation(
    members: Sequence[float],
    others: Sequence[float],
    *,
    false_alarms: float = 0.01,
    confidence: float = 0.95,
) -> Separation:
    """Return how well a signal separates members from texts that were not trained on.

    The area is the chance that a member's signal is above another's, ties counting half (Mann-Whitney). An
    attack is judged by the members it catches at few false alarms (arXiv 2112.03570).

    Raises:
        ValueError: there is no member, no other, or a signal is not a number.
    """
    values_M, values_O = torch.tensor(members).double(), torch.tensor(others).double()
    if not len(values_M) or not len(values_O) or not bool(torch.cat([values_M, values_O]).isfinite().all()):
        raise ValueError("a separation needs finite signals of at least one member and one other")
    ordered_O = values_O.sort().values
    below_M = torch.searchsorted(ordered_O, values_M, right=False)
    up_to_M = torch.searchsorted(ordered_O, values_M, right=True)
    area = float((below_M + up_to_M).double().mean()) / (2 * len(ordered_O))  # a tie is in one of the two
    threshold = ordered_O[-1 - int(false_alarms * len(ordered_O))]
    num_caught = int((values_M > threshold).sum())
    low, high = clopper_pearson(num_caught, len(values_M), confidence)
    return Separation(
        area=area,
        caught=num_caught / len(values_M),
        low=low,
        high=high,
        false_alarms=false_alarms,
        num_members=len(values_M),
        num_others=len(ordered_O),
    )


def roc(members: Sequence[float], others: Sequence[float]) -> list[tuple[float, float]]:
    """Return the ROC curve: (share of false alarms, share of members caught) at every threshold, from (0, 0).

    Straight lines between the points enclose the area of `separation`.
    """
    values_M, values_O = torch.tensor(members).double(), torch.tensor(others).double()
    points = [(0.0, 0.0)]
    for threshold in sorted({*members, *others}, reverse=True):
        caught, alarms = (values_M >= threshold).double().mean(), (values_O >= threshold).double().mean()
        points.append((float(alarms), float(caught)))
    return points


def leads(adapters: Sequence[Sequence[float]], base: Sequence[float]) -> tuple[float, ...]:
    """Return for every text by how much one client's adapter is ahead of all others, in nats per token.

    `adapters[k][n]` and `base[n]` are mean log-probabilities of text n. The lead is the best client's number
    minus the best among the other clients and the base: large where one client alone knows the text. A number
    that is not finite leaves the lead unknown, which is written as infinite.
    """
    table = torch.tensor([*adapters, base]).double()
    best = table.topk(min(2, len(table)), dim=0)
    lead_N = best.values[0] - best.values[-1]
    lead_N = torch.where(best.indices[0] == len(adapters), 0.0, lead_N)  # the base model is no client
    return tuple(torch.where(table.isfinite().all(dim=0), lead_N, torch.inf).tolist())


def outliers(leads_: Sequence[float], limit: float = OUTLIER, least: float = LEAST_LEAD) -> tuple[bool, ...]:
    """Return which leads stand out of the set: by their modified z-score, and by at least `least`.

    Clients of different domains lead on texts of their own domain. Only a lead far above the usual one is a
    sign that an adapter repeats what it was trained on. An unknown lead stands out.
    """
    lead_N = torch.tensor(leads_).double()
    known_M = lead_N[lead_N.isfinite()]
    if not len(known_M):
        return (True,) * len(lead_N)
    middle = known_M.quantile(0.5)
    spread = (known_M - middle).abs().quantile(0.5)
    # 0.6745: the median absolute deviation of a standard normal, so that scores read as z-scores.
    return tuple(((0.6745 * (lead_N - middle) > limit * spread) & (lead_N >= least)).tolist())
