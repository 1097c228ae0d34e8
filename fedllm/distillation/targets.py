"""What a teacher predicts for some rows, kept small, and the loss of a student that learns it.

Of a distribution over V tokens the k likeliest are kept with their log-probabilities in 16 bits, and all
others as one probability, the tail: k = 64 of V = 49,152 is 400 bytes a token in place of 196,608. Teacher
and student are compared over these k + 1 buckets, by forward KL or by the divergence of GKD.
Tensor suffixes: N predicted token of all rows, n those of a chunk, k kept token, b bucket (k and the tail),
K teacher, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate

import torch

from fedllm.errors import ConfigError
from fedllm.models.chat import Encoded

# Nats below which a token counts as learnt and gives no gradient. What 16 bits round is less than a fifth of
# it; AdamW has no scale of its own and would take a whole step along such rounding.
RESOLUTION = 1e-5

# --- divergences -------------------------------------------------------------------------------------------

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
class BucketDivergence:
    """The loss of a few tokens: a divergence between teacher and student over the buckets."""

    ids_Nk: torch.Tensor
    teacher_Nb: torch.Tensor  # log-probabilities
    divergence: Divergence

    def __call__(
        self, part: slice, logits_NV: torch.Tensor, wants_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses and gradients; see `fedllm.engine.head.Criterion`.

        With g_b the gradient for the log-probability of bucket b, s the student's probabilities and r those
        among the tokens of the tail, the gradient for logit v is g_v, or g_tail r_v in the tail, minus
        s_v sum_b g_b.
        """
        ids_nk = self.ids_Nk[part]
        teacher_nb = self.teacher_Nb[part].to(logits_NV.dtype)
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


# --- targets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Targets:
    """What a teacher predicts for every learnt token of `rows`, in order; made on the CPU.

    As the objective of a training job: a student is to predict what the teacher does, by `divergence`.
    """

    rows: tuple[Encoded, ...]
    ids_Nk: torch.Tensor  # int32, the likeliest first
    log_probs_Nk: torch.Tensor  # 16-bit, of the kept tokens
    tail_N: torch.Tensor  # probability of all other tokens together
    entropy_N: torch.Tensor  # of the whole distribution, in nats
    weights_NK: torch.Tensor  # of every teacher at every token
    loss: float  # the teacher's own mean loss on the rows' tokens, in nats
    silenced: tuple[int, ...] = ()  # teachers whose numbers were not finite, by their place
    divergence: Divergence = forward_kl

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where in N each row begins, and the end."""
        return (0, *accumulate(row.num_supervised for row in self.rows))

    @cached_property
    def places(self) -> dict[Encoded, int]:
        """The place of each row; equal rows have equal targets."""
        return {row: place for place, row in enumerate(self.rows)}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors; `target_bytes` knows them beforehand."""
        tensors = (self.ids_Nk, self.log_probs_Nk, self.tail_N, self.entropy_N, self.weights_NK)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def entropy(self) -> float:
        """Mean entropy of the teacher's distribution over all tokens, in nats."""
        return float(self.entropy_N.double().mean())

    def on(self, device: torch.device) -> "Targets":
        """Return the same with all that `criterion` needs on a device, for a training of many steps there."""
        ids_Nk, log_probs_Nk = self.ids_Nk.to(device), self.log_probs_Nk.to(device)
        return replace(self, ids_Nk=ids_Nk, log_probs_Nk=log_probs_Nk, tail_N=self.tail_N.to(device))

    def criterion(self, rows: Sequence[Encoded], device: torch.device) -> BucketDivergence:
        """Return the loss of the learnt tokens of `rows`, which must be rows of the targets."""
        places = [self.places[row] for row in rows]
        parts = [slice(self.starts[place], self.starts[place + 1]) for place in places]
        ids_Nk = torch.cat([self.ids_Nk[part] for part in parts]).long()
        tail_N1 = torch.cat([self.tail_N[part] for part in parts])[:, None]
        tail_N1 = tail_N1.clamp(min=torch.finfo(tail_N1.dtype).tiny)  # a finite logarithm
        kept_Nk = torch.cat([self.log_probs_Nk[part] for part in parts]).to(tail_N1.dtype)
        # The softmax makes what 16 bits have rounded sum to 1 again.
        teacher_Nb = torch.cat([kept_Nk, tail_N1.log()], dim=1).log_softmax(dim=1)
        return BucketDivergence(ids_Nk.to(device), teacher_Nb.to(device), self.divergence)


def target_bytes(num_tokens: int, num_kept: int, num_teachers: int) -> int:
    """Return the bytes that targets for `num_tokens` learnt tokens take.

    For each: an int32 and 16 bits per kept token, float32 for tail and entropy, float32 per teacher's weight.
    """
    return num_tokens * (num_kept * (4 + 2) + 4 + 4 + 4 * num_teachers)
