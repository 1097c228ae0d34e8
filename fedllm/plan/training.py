"""How clients train: the numbers of one round, and of their personal adapters."""

import math
from dataclasses import dataclass, replace

from fedllm.config.key import number_or, split_number
from fedllm.config.keys import PersonalConfig, TrainConfig
from fedllm.messages import LocalTraining

DITTO_PULL = 0.1  # where `personal.mode` gives none


@dataclass(frozen=True, kw_only=True)
class PersonalTraining:
    """Numbers of the personal adapter; `pull` 0 is dual, above it Ditto."""

    rank: int
    steps: int
    pull: float

    def training(self, shared: LocalTraining) -> LocalTraining:
        """Return how it is trained: like the shared adapter, but for its steps and its pull."""
        return replace(shared, steps=self.steps, proximal=self.pull, proximal_space="product")


def personal_training(section: PersonalConfig) -> PersonalTraining | None:
    """Return the numbers of personal adapters, None where clients have none."""
    if section.mode == "none":
        return None
    mode, pull = split_number(section.mode, DITTO_PULL)
    return PersonalTraining(rank=section.rank, steps=section.steps, pull=pull if mode == "ditto" else 0.0)


def local_training(train: TrainConfig, dropout: float, *, round_num: int, num_rounds: int) -> LocalTraining:
    """Return how a client trains in a round, counted from 1."""
    word, proximal = split_number(train.proximal, 0.0)
    # No word before the number: the pull acts on A and B themselves.
    rate = train.learning_rate
    if train.schedule == "cosine":  # half a cosine over the run; rounds beyond it stay at its end
        progress = min(1.0, (round_num - 1) / num_rounds)
        rate = rate * 0.5 * (1 + math.cos(math.pi * progress))
    return LocalTraining(
        steps=train.local_steps,
        batch_size=train.batch_size,
        learning_rate=rate,
        weight_decay=train.weight_decay,
        clip_norm=number_or(train.clip_norm, 0.0),
        dropout=dropout,
        proximal=proximal,
        proximal_space=word or "factor",
    )
