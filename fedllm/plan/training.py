"""How clients train: in a round, a personal adapter, and on at home after the last round."""

import math
from dataclasses import dataclass, replace

from fedllm.config.key import named_values, number_or, split_number
from fedllm.config.keys import PersonalConfig, TrainConfig
from fedllm.errors import ConfigError
from fedllm.messages import LocalTraining

FINETUNE = "finetune"  # of `personal.mode`
PERSONAL_RANK, MOST_RANK, DITTO_PULL = 4, 4096, 0.1  # rank and pull where `personal.mode` gives none
_NAMED = {"dual": ("rank",), "ditto": ("rank", "pull")}  # what the modes on top take


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
    """Return the numbers of personal adapters that train beside the shared one, None where there are none.

    Raises:
        ConfigError: `personal.mode` names a number that its mode does not take, or one out of range.
    """
    mode, _, text = section.mode.partition(":")
    if mode not in _NAMED:
        return None
    try:
        named = named_values("personal.mode", text, _NAMED[mode])
        rank, pull = int(named.get("rank", PERSONAL_RANK)), float(named.get("pull", DITTO_PULL))
        if not (1 <= rank <= MOST_RANK and 0 < pull < math.inf):
            raise ValueError("out of range")
    except (ConfigError, ValueError):
        raise ConfigError(
            f"personal.mode = {section.mode!r}: {mode} takes numbers for {' and '.join(_NAMED[mode])}, as in"
            f" {mode}:rank=4; rank goes from 1 to {MOST_RANK:,}, pull is above 0"
        ) from None
    return PersonalTraining(rank=rank, steps=section.steps, pull=pull if mode == "ditto" else 0.0)


def home_training(
    section: PersonalConfig, first_round: LocalTraining, *, num_rounds: int, is_reported: bool
) -> HomeTraining | None:
    """Return how clients train on at home, None where they do not.

    It is as in the first round, but for a learning rate of its own where the mode has one, and that nothing
    pulls it back to the shared adapter.
    """
    if section.mode.partition(":")[0] != FINETUNE:
        return None
    _, rate = split_number(section.mode, first_round.learning_rate)
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
