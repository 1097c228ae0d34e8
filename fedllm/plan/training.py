"""How clients train: in a round, a personal adapter, and on at home after the last round."""

import math
from dataclasses import dataclass, replace

from fedllm.config.key import number_or, split_number
from fedllm.config.keys import PersonalConfig, TrainConfig
from fedllm.messages import LocalTraining

FINETUNE = "finetune"  # of `personal.mode`
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


@dataclass(frozen=True, kw_only=True)
class HomeTraining:
    """What clients do after the last round: train on by themselves, at most the steps of `training`.

    `rounds_steps` are those of all rounds. `is_reported` says whether losses may leave: they depend on the
    rows that were trained on, and nothing noises them.
    """

    training: LocalTraining
    rounds_steps: int
    is_reported: bool

    @property
    def most_alone(self) -> int:
        """The most steps of the control, which trains from the initial adapter."""
        return self.rounds_steps + self.training.steps

    def steps_alone(self, num_drawn: int) -> int:
        """Return the steps of a client's control: those of its rounds, by the rows it drew, and of home."""
        return min(num_drawn // self.training.batch_size, self.rounds_steps) + self.training.steps

    @property
    def most(self) -> int:
        """The most steps of a client, at home and for the control together."""
        return self.training.steps + self.most_alone


def personal_training(section: PersonalConfig) -> PersonalTraining | None:
    """Return the numbers of personal adapters that train beside the shared one, None where there are none."""
    mode, pull = split_number(section.mode, DITTO_PULL)
    if mode in ("none", FINETUNE):
        return None
    return PersonalTraining(rank=section.rank, steps=section.steps, pull=pull if mode == "ditto" else 0.0)


def home_training(
    section: PersonalConfig, first_round: LocalTraining, *, num_rounds: int, is_reported: bool
) -> HomeTraining | None:
    """Return how clients train on at home, None where they do not.

    It is as in the first round, but for a learning rate of its own where the mode has one, and that nothing
    pulls it back to the shared adapter.
    """
    mode, rate = split_number(section.mode, first_round.learning_rate)
    if mode != FINETUNE:
        return None
    training = replace(first_round, steps=section.steps, learning_rate=rate, proximal=0.0)
    return HomeTraining(
        training=training, rounds_steps=first_round.steps * num_rounds, is_reported=is_reported
    )


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
