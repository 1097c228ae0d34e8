"""What a teacher said of some rows, kept small: its likeliest tokens and one bucket for all others.

Of the law over V tokens the k likeliest are kept with their log-probabilities in 16 bits, and what is left as
one number, the tail: k = 64 of V = 49,152 is 400 bytes a token in place of 196,608.
Tensor suffixes: N predicted token of all rows, k kept token, b bucket (k and the tail), K teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from fedllm.models.chat import IGNORED, Encoded


@dataclass(frozen=True, eq=False)
class Targets:
    """What a teacher said of every learnt token of `rows`, in order; all tensors lie on the CPU."""

    rows: tuple[Encoded, ...]
    ids_Nk: torch.Tensor  # int32, the likeliest first
    log_probs_Nk: torch.Tensor  # 16-bit, of the kept tokens
    tail_N: torch.Tensor  # probability of all other tokens together
    entropy_N: torch.Tensor  # of the whole law, in nats
    weights_NK: torch.Tensor  # of every teacher at every token
    loss: float  # the teacher's own mean loss on the rows' tokens, in nats: what a perfect student reaches
    silenced: tuple[int, ...] = ()  # teachers whose numbers were not finite, by their place

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
        """Mean entropy of the teacher's law over all tokens, in nats."""
        return float(self.entropy_N.double().mean())

    def of_rows(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (kept ids [n, k], log-probabilities of the buckets [n, b]) for the learnt tokens of `rows`.

        The buckets are the kept tokens and then the tail; what 16 bits have rounded is made to sum to 1.
        """
        places = [self.places[row] for row in rows]
        parts = [slice(self.starts[place], self.starts[place + 1]) for place in places]
        ids_nk = torch.cat([self.ids_Nk[part] for part in parts]).long()
        tail_n1 = torch.cat([self.tail_N[part] for part in parts])[:, None]
        tail_n1 = tail_n1.clamp(min=torch.finfo(tail_n1.dtype).tiny)  # a finite logarithm
        kept_nk = torch.cat([self.log_probs_Nk[part] for part in parts]).to(tail_n1.dtype)
        return ids_nk, torch.cat([kept_nk, tail_n1.log()], dim=1).log_softmax(dim=1)


def target_bytes(num_tokens: int, num_kept: int, num_teachers: int) -> int:
    """Return the bytes that targets for `num_tokens` learnt tokens take.

    For each: an int32 and 16 bits a kept token, float32 for tail and entropy, float32 a teacher's weight.
    """
    return num_tokens * (num_kept * (4 + 2) + 4 + 4 + 4 * num_teachers)


def learnt_tokens(row: Encoded) -> list[int]:
    """Return the tokens of a row whose prediction is learnt."""
    return [label for label in row.labels[1:] if label != IGNORED]
