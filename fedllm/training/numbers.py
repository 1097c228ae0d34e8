"""From a run's configuration to the numbers of one client's training in one round."""

import math

from fedllm.config import RunConfig
from fedllm.types import LocalTraining


def local_training(config: RunConfig, round_num: int) -> LocalTraining:
    """Return how a client trains in a round, counted from 1."""
    train = config.train
    return LocalTraining(
        steps=train.local_steps,
        batch_size=train.batch_size,
        learning_rate=learning_rate(config, round_num),
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        dropout=config.lora.dropout,
        proximal=train.proximal,
        proximal_space=train.proximal_space,
    )


def learning_rate(config: RunConfig, round_num: int) -> float:
    """Return the learning rate of a round: constant, or half a cosine over the run."""
    if config.train.schedule == "constant":
        return config.train.learning_rate
    progress = min(1.0, (round_num - 1) / config.federation.num_rounds)
    return config.train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
