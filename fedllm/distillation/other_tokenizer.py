"""A teacher with another tokenizer: ULD, universal logit distillation (arXiv 2402.12030).

Two vocabularies have no token in common, but how sure a model is can be compared: the probabilities of both,
each sorted from the largest, rank by rank. The loss of a token is its cross-entropy plus

    weight * sum_r |teacher_(r) - student_(r)|

the Wasserstein-1 distance where every two tokens are equally far apart. The shorter vocabulary is filled up
with zeros. Only the teacher's k largest are kept, and the sum of the rest; the ranks beyond k are compared by
their sums, which is at most their distance and the same where k is all.

The paper pairs tokens by their number. Here a token of the student is paired where the teacher predicts after
the very same text. Where the teacher's tokenizer has no boundary there, or the token is predicted inside a
character of several bytes, cross-entropy alone is left.
Tensor suffixes: N student's learnt token, n those of a chunk, k kept rank, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from fedllm.distillation.targets import Targets
from fedllm.engine.head import CrossEntropy
from fedllm.errors import NoDataError
from fedllm.models.chat import Encoded

PAPER_WEIGHT = 1.5


@dataclass(frozen=True)
class Pair:
    """One text in both vocabularies.

    `partners[i]` is the teacher's learnt token that is predicted after the same text as the student's learnt
    token i, or -1.
    """

    student: Encoded
    teacher: Encoded
    partners: tuple[int, ...]


def pair_text(text: str, student_tokenizer: Any, teacher_tokenizer: Any, max_tokens: int) -> Pair | None:
    """Return a text's first `max_tokens` tokens in both vocabularies, or None where either learns nothing."""
    student, student_after = _encoded(text, student_tokenizer, max_tokens)
    teacher, teacher_after = _encoded(text, teacher_tokenizer, max_tokens)
    if not (student.num_supervised and teacher.num_supervised):
        return None
    places = {after: place for place, after in enumerate(teacher_after) if after is not None}
    partners = (-1 if after is None else places.get(after, -1) for after in student_after)
    return Pair(student, teacher, tuple(partners))


def _encoded(text: str, tokenizer: Any, max_tokens: int) -> tuple[Encoded, list[int | None]]:
    """Return the row of a text, and after how many characters each of its learnt tokens is predicted.

    None stands for a token that is predicted inside a character.
    """
    encoding = tokenizer(text, return_offsets_mapping=True)
    tokens = tuple(encoding["input_ids"][:max_tokens])
    ends = [end for _, end in encoding["offset_mapping"][:max_tokens]]
    # Every byte of a character has the character's end as its own, so two equal ends are inside one.
    return Encoded(tokens, tokens), [end if end != next_end else None for end, next_end in pairwise(ends)]


@dataclass(frozen=True, eq=False)
class PairedTargets:
    """The objective of a student whose teacher has another tokenizer.

    `pairs` has a text for every row of the student, `targets` what the teacher predicts for its own rows.

    Raises:
        NoDataError: there is no pair.
    """

    pairs: Mapping[Encoded, Pair]
    targets: Targets
    weight: float = PAPER_WEIGHT

    def __post_init__(self) -> None:
        if not self.pairs:
            raise NoDataError("distillation: no text has tokens to learn in both vocabularies")

    @property
    def rows(self) -> tuple[Encoded, ...]:
        """The student's rows."""
        return tuple(self.pairs)

    def on(self, device: torch.device) -> "PairedTargets":
        """Return the same with the targets on a device; see `Targets.on`."""
        return replace(self, targets=self.targets.on(device))

    def criterion(self, rows: Sequence[Encoded], device: torch.device) -> "SortedDistance":
        """Return the loss of the learnt tokens of `rows`, which must be rows of the student."""
        places = []
        for row in rows:
            pair = self.pairs[row]
            start = self.targets.starts[self.targets.places[pair.teacher]]
            places += [start + partner if partner >= 0 else -1 for partner in pair.partners]
        places_N = torch.tensor(places, device=self.targets.tail_N.device)
        found_N = places_N.clamp(min=0)  # any token will do where weight 0 leaves it out
        tail_N1 = self.targets.tail_N[found_N, None]
        kept_Nk = self.targets.log_probs_Nk[found_N].to(tail_N1.dtype).exp()
        tokens = [token for row in rows for token in row.learnt_tokens]
        return SortedDistance(
            torch.tensor(tokens, device=device),
            kept_Nk.to(device),
            tail_N1.to(device),
            (places_N >= 0).to(device) * self.weight,
        )


@dataclass(frozen=True, eq=False)
class SortedDistance:
    """Cross-entropy with the next token, plus weight times the distance of the sorted probabilities."""

    targets_N: torch.Tensor
    kept_Nk: torch.Tensor  # the teacher's largest probabilities, falling
    tail_N1: torch.Tensor  # the sum of its others
    weight_N: torch.Tensor  # 0 for a token that has no partner

    def __call__(
        self, part: slice, logits_NV: torch.Tensor, wants_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses and gradients; see `fedllm.engine.head.Criterion`."""
        probs_nV, weight_n1 = logits_NV.softmax(dim=1), self.weight_N[part, None].to(logits_NV.dtype)
        number = min(self.kept_Nk.shape[1], probs_nV.shape[1])
        largest_nk, ids_nk = probs_nV.topk(number, dim=1)
        # A rank that the student's shorter vocabulary does not have is compared with 0.
        beyond_n1 = self.kept_Nk[part, number:].sum(dim=1, keepdim=True) + self.tail_N1[part]
        over_nk = largest_nk - self.kept_Nk[part, :number].to(probs_nV.dtype)
        rest_n1 = (probs_nV.sum(dim=1, keepdim=True) - largest_nk.sum(dim=1, keepdim=True)) - beyond_n1
        distance_n = over_nk.abs().sum(dim=1) + rest_n1.abs()[:, 0]
        losses_n, grad_nV = CrossEntropy(self.targets_N)(part, logits_NV, wants_grad)
        losses_n = losses_n + weight_n1[:, 0] * distance_n
        if grad_nV is None:
            return losses_n, None
        # |x| has slope sign(x); through the softmax a slope g gives p (g - sum p g).
        slope_nV = rest_n1.sign().expand_as(probs_nV).scatter(1, ids_nk, over_nk.sign())
        mean_n1 = (probs_nV * slope_nV).sum(dim=1, keepdim=True)
        return losses_n, grad_nV.add_(probs_nV.mul_(slope_nV.sub_(mean_n1)).mul_(weight_n1))
