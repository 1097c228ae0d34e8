"""How far a student's law is from a teacher's, over buckets: its likeliest tokens, and the rest.

A bucket holds the sum of the probabilities in it, so a divergence over buckets is at most that over the whole
vocabulary and 0 where the laws agree on every bucket; with all tokens kept it is the whole one. Temperature
is 1 throughout: the law that is taught is the law that is wanted.
Tensor suffixes: n token, k kept token, b bucket (k and the tail), V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fedllm.distillation.targets import Targets
from fedllm.errors import ConfigError
from fedllm.models.chat import Encoded

# Nats below which a token counts as learnt and gives no gradient. What 16 bits round is less than a fifth of
# it; AdamW has no scale of its own and would take a whole step along such rounding.
RESOLUTION = 1e-5

# (teacher's, student's log-probabilities of the buckets [n, b]) -> divergence [n] in nats
Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def forward_kl(teacher_nb: torch.Tensor, student_nb: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher | student) [n]."""
    return (teacher_nb.exp() * (teacher_nb - student_nb)).sum(dim=1)


def jensen_shannon(beta: float) -> Divergence:
    """Return the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649).

    With M = beta T + (1 - beta) S it is beta KL(T | M) + (1 - beta) KL(S | M), between the forward KL as beta
    goes to 0 and the reverse KL as it goes to 1; 0 and 1 give those themselves.

    Raises:
        ConfigError: beta is not between 0 and 1.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"the generalised Jensen-Shannon divergence has a beta from 0 to 1, not {beta}")
    if beta == 0:
        return forward_kl
    if beta == 1:
        return lambda teacher_nb, student_nb: forward_kl(student_nb, teacher_nb)
    return partial(_jensen_shannon, beta=beta)


def _jensen_shannon(teacher_nb: torch.Tensor, student_nb: torch.Tensor, *, beta: float) -> torch.Tensor:
    middle_nb = torch.logaddexp(teacher_nb + math.log(beta), student_nb + math.log1p(-beta))
    return beta * forward_kl(teacher_nb, middle_nb) + (1 - beta) * forward_kl(student_nb, middle_nb)


@dataclass(frozen=True, eq=False)
class Buckets:
    """The criterion of a few tokens: the divergence of the model's law from the teacher's over buckets."""

    ids_Nk: torch.Tensor
    log_law_Nb: torch.Tensor  # of the teacher
    divergence: Divergence

    def __call__(
        self, part: slice, logits_NV: torch.Tensor, wants_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses and gradients; see `fedllm.training.head.Criterion`.

        With g_b the gradient for the log-probability of bucket b, s the student's law and r its law among the
        tokens of the tail, that for logit v is g_v, or g_tail r_v in the tail, minus s_v sum_b g_b.
        """
        ids_nk = self.ids_Nk[part]
        teacher_nb = self.log_law_Nb[part].to(logits_NV.dtype)
        logits_NV.sub_(logits_NV.logsumexp(dim=1, keepdim=True))
        student_nb = logits_NV.gather(1, ids_nk)
        others_NV = logits_NV.scatter(1, ids_nk, -torch.inf)
        has_tail = ids_nk.shape[1] < logits_NV.shape[1]
        if has_tail:
            tail_n1 = others_NV.logsumexp(dim=1, keepdim=True)
            student_nb = torch.cat([student_nb, tail_n1], dim=1)
        else:
            teacher_nb = teacher_nb[:, :-1].log_softmax(dim=1)
        if not wants_grad:
            return self.divergence(teacher_nb, student_nb), None
        with torch.enable_grad():  # through the few numbers of the buckets, never the vocabulary
            student_nb = student_nb.detach().requires_grad_()
            losses_n = self.divergence(teacher_nb, student_nb)
            (grad_nb,) = torch.autograd.grad(losses_n.sum(), student_nb)
        grad_nb.masked_fill_((losses_n < RESOLUTION)[:, None], 0.0)
        grad_NV = logits_NV.exp_().mul_(-grad_nb.sum(dim=1, keepdim=True))
        grad_NV.scatter_add_(1, ids_nk, grad_nb[:, : ids_nk.shape[1]].contiguous())
        if has_tail:
            grad_NV.addcmul_(others_NV.sub_(tail_n1).exp_(), grad_nb[:, -1:])
        return losses_n.detach(), grad_NV


@dataclass(frozen=True, eq=False)
class TaughtBy:
    """The objective of a student: to say of every row of `targets` what the teacher said."""

    targets: Targets
    divergence: Divergence = forward_kl

    def criterion(self, rows: Sequence[Encoded], device: torch.device) -> Buckets:
        """Return the criterion for the learnt tokens of `rows`, which are rows of the targets."""
        ids_Nk, log_law_Nb = self.targets.of_rows(rows)
        return Buckets(ids_Nk.to(device), log_law_Nb.to(device), self.divergence)
