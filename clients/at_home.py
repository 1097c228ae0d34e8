"""Training that never leaves a client, as long as its own held-out rows say that it helps.

From the adapter that a federation has made, each client goes on with its own rows alone: fine-tuning the
shared model, the plain and strong baseline of personalised federated learning (arXiv 2108.07313). How many
steps, zero among them, it chooses on one half of its held-out rows; the other half measures what was chosen,
so the choice flatters no number. From the initial adapter the same training is the control: what the client
would have had alone.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from clients.tokens import ClientTokens
from fedllm.adapters.layout import AdapterLayout
from fedllm.data.shards import draw_rows
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job, Result
from fedllm.messages import LocalTraining
from fedllm.models.chat import Encoded
from fedllm.seeds import derive_seed

SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the most steps, that a client chooses among
FEWEST_HELD_OUT = 2  # one row chooses, one measures


@dataclass(frozen=True, eq=False)
class AtHome:
    """What a client has after training by itself: the adapter [P] after `steps` steps.

    `choosing` are the losses by number of steps on the rows that chose. `loss`, `start_loss` of the adapter
    it began with, and `last_loss` after the most steps are on the rows that measure. All are in nats per
    learnt token.
    """

    vector: torch.Tensor
    steps: int
    choosing: Mapping[int, float]
    loss: float
    start_loss: float
    last_loss: float


def can_choose(client: ClientTokens) -> bool:
    """Return whether a client has rows to train on, to choose by and to measure on."""
    return bool(client.train) and all(halves_of(client.held_out))


def halves_of(held_out: Sequence[Encoded]) -> tuple[tuple[Encoded, ...], tuple[Encoded, ...]]:
    """Return held-out rows as those that choose and those that measure, whatever their order.

    Equal rows are on one side: a copy would measure with what has chosen.
    """
    rows = {row: hashlib.sha256(repr((row.tokens, row.labels)).encode()).digest() for row in held_out}
    digests = sorted(set(rows.values()))
    choosing = set(digests[: len(digests) // 2])
    chosen, measured = (
        tuple(row for row in held_out if (rows[row] in choosing) is side) for side in (True, False)
    )
    return chosen, measured


def step_counts(most: int) -> tuple[int, ...]:
    """Return the numbers of steps that a client chooses among, of which `most` is the largest."""
    return tuple(sorted({round(share * most) for share in SHARES}))


def train_at_home(
    engine: Engine,
    layout: AdapterLayout,
    clients: Mapping[str, ClientTokens],
    starts: Mapping[str, torch.Tensor],
    training: LocalTraining,
    *,
    steps: Mapping[str, int],
    seed: int,
    drawn: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, AtHome]:
    """Train clients side by side from their `starts` [P] of `layout`; return what each has chosen.

    Args:
        engine: on the base model, with a base delta where the starts were trained on one.
        layout: of the starts.
        clients: by name; those that cannot choose (`can_choose`) are left out of the result.
        starts: by name; clients may share one vector object.
        training: learning rate, rows of a step and the like; its own number of steps does not count.
        steps: the most that each client trains, from 1.
        seed: of the run: it orders the rows of each client as its rounds do.
        drawn: rows that each client has drawn before, from which its rows go on; left out, none.
    """
    able = {name: client for name, client in clients.items() if can_choose(client)}
    jobs = [
        _job(client, layout, starts[name], replace(training, steps=steps[name]), seed, drawn.get(name, 0))
        for name, client in able.items()
    ]
    # Measured as they come: the deltas of all clients after all counts might not fit into memory.
    return {
        result.client_id: _choose(engine, layout, able[result.client_id], starts[result.client_id], result)
        for result in engine.train(jobs)
    }


def _job(
    client: ClientTokens,
    layout: AdapterLayout,
    start_P: torch.Tensor,
    training: LocalTraining,
    seed: int,
    num_drawn: int,
) -> Job:
    size, name = training.batch_size, client.client_id
    drawn = draw_rows(
        len(client.train), seed=seed, client_id=name, start=num_drawn, count=training.steps * size
    )
    rows = [client.train[index] for index in drawn]
    return Job(
        name,
        start_P,
        tuple(tuple(rows[step * size : (step + 1) * size]) for step in range(training.steps)),
        training,
        layout=layout,
        seed=derive_seed(seed, "at-home", name, num_drawn),
        stops=tuple(count for count in step_counts(training.steps) if count),
    )


def _choose(
    engine: Engine, layout: AdapterLayout, client: ClientTokens, start_P: torch.Tensor, result: Result
) -> AtHome:
    """Return the adapter with the lowest loss on the rows that choose; of equal ones that of fewest steps."""
    vectors = {0: start_P} | {count: start_P + delta.float() for count, delta in result.stops.items()}
    choosing, measuring = halves_of(client.held_out)

    def losses(counts: Collection[int], rows: tuple[Encoded, ...]) -> dict[int, float]:
        jobs = [EvaluationJob(str(count), vectors[count], rows, layout) for count in counts]
        return {int(answer.client_id): answer.loss for answer in engine.evaluate(jobs)}

    found = losses(vectors, choosing)
    if not all(map(math.isfinite, found.values())):  # in one pass a diverged adapter may spoil the others
        found = {count: losses([count], choosing)[count] for count in vectors}
    best = min(found, key=lambda count: found[count] if math.isfinite(found[count]) else math.inf)
    measured = losses({0, best, max(vectors)}, measuring)
    return AtHome(vectors[best], best, found, measured[best], measured[0], measured[max(vectors)])
