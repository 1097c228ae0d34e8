"""Numbers made coarse, where the machine's owner lets no exact ones leave ([allow] exact-numbers, [budget]).

Sizes and weights become the power of two at or below them, held-out losses are rounded to a tenth of a nat,
and what training measures (its loss, tokens, seconds) becomes 0, as under `privacy.metrics = "withheld"`.
"""

from dataclasses import replace

from fedllm.messages import ClientAtHome, ClientEvaluation, ClientUpdate, JoinedClient

LOSS_DECIMALS = 1


def coarse_size(number: int) -> int:
    """Return the largest power of two that is not above a number; 0 of 0."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0


def coarse_joined(client: JoinedClient) -> JoinedClient:
    """Return what a client declares with coarse sizes."""
    num_train, num_held_out = coarse_size(client.num_train), coarse_size(client.num_held_out)
    return replace(client, num_train=num_train, num_held_out=num_held_out)


def coarse_update(update: ClientUpdate) -> ClientUpdate:
    """Return an update with a coarse weight and none of the numbers that training measured."""
    # A weight below 1 is a share of privacy.weight-cap, and part of what the accounting counts on.
    weight = float(coarse_size(int(update.weight))) if update.weight >= 1 else update.weight
    return replace(update, weight=weight, num_tokens=0, train_loss=0.0, num_truncated=0, seconds=0.0)


def coarse_evaluation(evaluation: ClientEvaluation) -> ClientEvaluation:
    """Return an evaluation with losses and sizes that are coarse."""
    personal = evaluation.personal_loss
    return replace(
        evaluation,
        loss=round(evaluation.loss, LOSS_DECIMALS),
        personal_loss=None if personal is None else round(personal, LOSS_DECIMALS),
        num_tokens=coarse_size(evaluation.num_tokens),
        num_rows=coarse_size(evaluation.num_rows),
    )


def coarse_at_home(answer: ClientAtHome) -> ClientAtHome:
    """Return what training on at home gave with losses and steps that are coarse."""
    alone, shared, home = (round(loss, LOSS_DECIMALS) for loss in (answer.alone, answer.shared, answer.home))
    return replace(answer, alone=alone, shared=shared, home=home, steps=coarse_size(answer.steps))
