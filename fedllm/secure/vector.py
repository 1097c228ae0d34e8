"""The vector that a party adds to a secret sum: its weighted delta and three numbers, as words of the ring.

    Q words   weight * delta
    1 word    weight
    1 word    tokens
    1 word    tokens * loss

In the sum these give the weighted mean of the deltas, the total weight, the tokens and their mean loss, so no
number of a single client need leave. Each kind has a range, and so a step, of its own: the sum of all clients
never wraps around.
"""

from dataclasses import dataclass

import numpy as np

from fedllm.errors import SecureError
from fedllm.secure.agreement import Stream
from fedllm.secure.ring import BITS, quantise, step_for, value_of

LARGEST_LOSS = 32.0  # nats a token, far above any even guess: a loss that is larger counts as this
NUM_NUMBERS = 3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the words of a sum over `num_clients` clients mean.

    No honest value of a delta is above `largest`, no weight above `weight_cap`, and no client learns from
    more than `most_tokens`. `delta_step` is the step of weight / weight_cap * delta; where it is 0 it follows
    from `largest`.
    """

    num_clients: int
    largest: float
    weight_cap: float
    most_tokens: int
    delta_step: float = 0.0
    bits: int = BITS

    @property
    def step(self) -> float:
        """The step of the delta's words, of weight / weight_cap * delta."""
        return self.delta_step or step_for(self.largest, self.num_clients, self.bits)

    @property
    def number_steps(self) -> np.ndarray:
        """The steps [3] of the numbers' words: weight / weight_cap, tokens / most_tokens, and its loss."""
        step = step_for(1.0, self.num_clients, self.bits)
        return np.array([step, step, LARGEST_LOSS * step])


@dataclass(frozen=True, kw_only=True, eq=False)
class SecretSum:
    """What a sum says: the weighted mean [Q] of the deltas, the total weight and tokens, their mean loss."""

    mean: np.ndarray
    weight: float
    num_tokens: int
    loss: float


def client_values(
    delta_Q: np.ndarray, *, weight: float, num_tokens: int, loss: float, scale: Scale
) -> np.ndarray:
    """Return what one client adds [Q + 3] (float64), before it becomes words; a node adds up its clients.

    What is outside its range is taken as the nearest value inside: it would wrap around.
    """
    share = min(max(weight / scale.weight_cap, 0.0), 1.0)
    tokens = min(max(num_tokens / scale.most_tokens, 0.0), 1.0)
    values = np.empty(len(delta_Q) + NUM_NUMBERS)
    np.clip(delta_Q, -scale.largest, scale.largest, out=values[:-NUM_NUMBERS])
    values[:-NUM_NUMBERS] *= share
    values[-NUM_NUMBERS:] = share, tokens, tokens * min(max(loss, 0.0), LARGEST_LOSS)
    return values


def words_of(values: np.ndarray, scale: Scale, stream: Stream) -> np.ndarray:
    """Return values [Q + 3] as words (uint32); raises as `ring.quantise`."""
    delta = quantise(values[:-NUM_NUMBERS], scale.step, stream)
    return np.concatenate([delta, number_words(values[-NUM_NUMBERS:], scale, stream)])


def number_words(numbers: np.ndarray, scale: Scale, stream: Stream) -> np.ndarray:
    """Return the three numbers [3] as words (uint32); raises as `ring.quantise`."""
    return quantise(numbers, scale.number_steps, stream)


def read_sum(words: np.ndarray, scale: Scale) -> SecretSum:
    """Return what the sum [Q + 3] (uint32) of all parties' words says.

    Raises:
        SecureError: the clients weigh nothing together, so that there is no mean.
    """
    share, tokens, losses = value_of(words[-NUM_NUMBERS:], scale.number_steps, scale.bits)
    if share <= 0:
        raise SecureError("the clients of the secret sum weigh nothing together")
    return SecretSum(
        mean=value_of(words[:-NUM_NUMBERS], scale.step, scale.bits) / share,
        weight=float(share * scale.weight_cap),
        num_tokens=max(0, round(float(tokens * scale.most_tokens))),
        loss=float(losses / tokens) if tokens > 0 else 0.0,
    )
