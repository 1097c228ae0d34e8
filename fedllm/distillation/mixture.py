"""The next-token law of an ensemble: how much each teacher counts at each token, and what they say together.

posterior   w_k(t) = softmax_k[log prior_k + temper * sum_{s<t} log p_k(y_s | y_<s)] and the law is
            sum_k w_k(t) p_k(. | y_<t). With temper 1, and p_k the law of client k's text, this is the law of
            the pooled text: its joint law is sum_k prior_k p_k(y), and Bayes gives the rest. A weight looks
            at no token that it helps to predict.
uniform     the plain mean of the laws of all teachers.
logit-mean  the softmax of the mean logits of all teachers (FedDF, arXiv 2006.07242).
Tensor suffixes: K teacher, N predicted token, T predicted token of one row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

KINDS = ("posterior", "uniform", "logit-mean")


@dataclass(frozen=True, eq=False)
class Mixing:
    """How teachers are mixed, those left out by a prior of 0. See the module for the kinds.

    `floor` is the share of all weight that is dealt evenly, so that nobody is ever out: w <- (1 - floor) w +
    floor / K.
    """

    kind: str
    log_priors_K: torch.Tensor  # float64; -inf leaves a teacher out
    temper: float = 1.0
    floor: float = 0.0

    def without(self, dead_K: torch.Tensor) -> "Mixing":
        """Return the same with teachers left out, on the device of `dead_K`."""
        priors_K = self.log_priors_K.to(dead_K.device).masked_fill(dead_K, -torch.inf)
        return Mixing(self.kind, priors_K, self.temper, self.floor)

    def weights(self, log_probs_TK: torch.Tensor, evidence_K: torch.Tensor) -> torch.Tensor:
        """Return the weights [T, K] in float64 for the next T tokens of a row.

        `log_probs_TK` is what each teacher gave these tokens, `evidence_K` the sum over those before them.
        """
        if self.kind == "posterior":
            return causal_weights(log_probs_TK, self.log_priors_K, self.temper, evidence_K, self.floor)
        present_K = self.log_priors_K.isfinite().double()
        return (present_K / present_K.sum()).expand(len(log_probs_TK), -1)


def mixture_weights(
    log_probs_NK: torch.Tensor,
    log_priors_K: torch.Tensor,
    temper: float = 1.0,
    row_starts: Sequence[int] = (0,),
    floor: float = 0.0,
) -> torch.Tensor:
    """Return the posterior weights [N, K] in float64 for tokens of rows that begin at `row_starts`."""
    nothing_K = torch.zeros_like(log_priors_K, dtype=torch.float64)
    ends = [*row_starts[1:], len(log_probs_NK)]
    parts = [
        causal_weights(log_probs_NK[begin:end], log_priors_K, temper, nothing_K, floor)
        for begin, end in zip(row_starts, ends, strict=True)
    ]
    return torch.cat(parts)


def causal_weights(
    log_probs_TK: torch.Tensor,
    log_priors_K: torch.Tensor,
    temper: float,
    evidence_K: torch.Tensor,
    floor: float = 0.0,
) -> torch.Tensor:
    """Return the posterior weights [T, K] in float64 of one row's tokens, given those before them.

    Where the text is impossible to every teacher the priors decide.
    """
    log_probs_TK, log_priors_K = log_probs_TK.double(), log_priors_K.double()
    before_TK = log_probs_TK.cumsum(dim=0).roll(1, dims=0)
    before_TK[:1] = 0.0
    scores_TK = log_priors_K.expand_as(before_TK)
    if temper:  # 0 * -inf is no number
        scores_TK = scores_TK + temper * (before_TK + evidence_K)
    impossible_T1 = scores_TK.isneginf().all(dim=1, keepdim=True)
    weights_TK = torch.where(impossible_T1, log_priors_K, scores_TK).softmax(dim=1)
    if floor:
        present_K = log_priors_K.isfinite().double()
        weights_TK = (1 - floor) * weights_TK + floor * present_K / present_K.sum()
    return weights_TK


@dataclass(frozen=True, eq=False)
class Mixed:
    """What an ensemble says of T tokens."""

    law_TV: torch.Tensor  # probabilities
    target_T: torch.Tensor  # log-probability of the token that follows
    weights_TK: torch.Tensor  # float64
    evidence_K: torch.Tensor  # float64, of the row up to and with these tokens


def mix(logits_KTV: torch.Tensor, targets_T: torch.Tensor, mixing: Mixing, evidence_K: torch.Tensor) -> Mixed:
    """Return what the ensemble says of the next T tokens of a row; the logits are overwritten.

    Logits must be finite, those of teachers that are left out too.
    """
    index_KT1 = targets_T.expand(len(logits_KTV), -1)[:, :, None]
    logits_KTV.sub_(logits_KTV.logsumexp(dim=2, keepdim=True))
    said_TK = logits_KTV.gather(2, index_KT1)[:, :, 0].T.double()
    weights_TK = mixing.weights(said_TK, evidence_K)
    shares_TK = weights_TK.to(logits_KTV.dtype)
    if (
        mixing.kind == "logit-mean"
    ):  # log-probabilities differ from logits by what the softmax takes out again
        log_law_TV = torch.einsum("tk,ktv->tv", shares_TK, logits_KTV).log_softmax(dim=1)
        law_TV, target_T = log_law_TV.exp(), log_law_TV.gather(1, targets_T[:, None])[:, 0]
    else:
        law_TV = torch.einsum("tk,ktv->tv", shares_TK, logits_KTV.exp_())
        target_T = (said_TK + weights_TK.log()).logsumexp(dim=1)
    return Mixed(law_TV, target_T, weights_TK, evidence_K + said_TK.sum(dim=0))
