"""Training that never leaves a client, as long as its own held-out rows say that it helps.

From the adapter that a federation has made, each client goes on with its own rows alone: fine-tuning the
shared model, the plain and strong baseline of personalised federated learning (arXiv 2108.07313). How many
steps, zero among them, it chooses on one half of its held-out rows; the other half measures what was chosen,
so the choice flatters no number. From the initial adapter the same training is the control: what the client
would have had alone.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from clients.tokens import ClientTokens
from fedllm.adapters.layout import AdapterLayout
from fedllm.data.shards import draw_rows
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job, Result
from fedllm.messages import ClientAtHome, LocalTraining
from fedllm.models.chat import Encoded
from fedllm.plan.training import HomeTraining
from fedllm.seeds import derive_seed

SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the most steps, that a client chooses among


@dataclass(frozen=True, eq=False)
class AtHome:
    """What a client has after training by itself: the adapter [P] after `steps` steps.

    Losses are by number of steps, in nats per learnt token: `choosing` on the rows that chose, `measured` on
    the others, after no step, those chosen and all.
    """

    vector: torch.Tensor
    steps: int
    choosing: Mapping[int, float]
    measured: Mapping[int, float]

    @property
    def loss(self) -> float:
        """The measured loss of the adapter that was chosen."""
        return self.measured[self.steps]


def can_choose(client: ClientTokens) -> bool:
    """Return whether a client has rows to train on, to choose by and, other ones, to measure on."""
    return bool(client.train) and len(set(client.held_out)) > 1


def split_held_out(rows: Sequence[Encoded]) -> tuple[tuple[Encoded, ...], tuple[Encoded, ...]]:
    """Return held-out rows as those that choose and those that measure, whatever their order.

    Equal rows are on one side: a copy would measure with what has chosen. A single row does both.
    """
    digests = {row: hashlib.sha256(repr((row.tokens, row.labels)).encode()).digest() for row in rows}
    choosing = set(sorted(digests, key=digests.__getitem__)[: len(digests) // 2])
    if not choosing:
        return tuple(rows), tuple(rows)
    return tuple(row for row in rows if row in choosing), tuple(row for row in rows if row not in choosing)


def step_counts(most: int) -> tuple[int, ...]:
    """Return the numbers of steps that a client chooses among, rising from 0 to `most`."""
    return tuple(sorted({round(share * most) for share in SHARES}))


def train_at_home(
    engine: Engine,
    layout: AdapterLayout,
    clients: Mapping[str, ClientTokens],
    starts: Mapping[str, torch.Tensor],
    training: LocalTraining,
    *,
    counts: Mapping[str, Sequence[int]],
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
        counts: the numbers of steps that each client chooses among, rising; it trains as many as the last.
        seed: of the run: it orders the rows of each client as its rounds do.
        drawn: rows that each client has drawn before, from which its rows go on; left out, none.
    """
    able = {name: client for name, client in clients.items() if can_choose(client)}
    jobs = [
        _job(client, layout, starts[name], training, tuple(counts[name]), seed, drawn.get(name, 0))
        for name, client in able.items()
    ]
    # Measured as they come: the deltas of all clients after all counts might not fit into memory.
    return {
        result.client_id: _choose(engine, layout, able[result.client_id], starts[result.client_id], result)
        for result in engine.train(jobs)
    }


@dataclass(frozen=True, eq=False)
class Starts:
    """The adapters [P] that clients begin with: the one nobody has trained, and the federation's."""

    initial: torch.Tensor
    shared: torch.Tensor


def train_both(
    engine: Engine,
    layout: AdapterLayout,
    clients: Mapping[str, ClientTokens],
    starts: Starts,
    numbers: HomeTraining,
    *,
    drawn: Mapping[str, int],
    seed: int,
    on_shared: AbstractContextManager[None],
) -> list[tuple[ClientAtHome, torch.Tensor]]:
    """Train clients alone, and on from the shared adapter; return what that gave each, and its adapter [P].

    `drawn` are the rows of their rounds. In the context `on_shared` the engine's base model is the one that
    the shared adapter was trained on.
    """
    alone = train_at_home(
        engine,
        layout,
        clients,
        dict.fromkeys(clients, starts.initial),
        numbers.training,
        counts={name: step_counts(numbers.steps_alone(drawn[name])) for name in clients},
        seed=seed,
    )
    with on_shared:
        home = train_at_home(
            engine,
            layout,
            clients,
            dict.fromkeys(clients, starts.shared),
            numbers.training,
            counts=dict.fromkeys(clients, step_counts(numbers.training.steps)),
            seed=seed,
            drawn=drawn,
        )
    return [
        (
            ClientAtHome(
                client_id=name, alone=alone[name].loss, shared=own.measured[0], home=own.loss, steps=own.steps
            ),
            own.vector,
        )
        for name, own in home.items()
    ]


def _job(
    client: ClientTokens,
    layout: AdapterLayout,
    start_P: torch.Tensor,
    training: LocalTraining,
    counts: tuple[int, ...],
    seed: int,
    num_drawn: int,
) -> Job:
    size, name, steps = training.batch_size, client.client_id, counts[-1]
    drawn = draw_rows(len(client.train), seed=seed, client_id=name, start=num_drawn, count=steps * size)
    rows = [client.train[index] for index in drawn]
    return Job(
        name,
        start_P,
        tuple(tuple(rows[step * size : (step + 1) * size]) for step in range(steps)),
        replace(training, steps=steps),
        layout=layout,
        seed=derive_seed(seed, "at-home", name, num_drawn),
        snapshots=counts,
    )


def _choose(
    engine: Engine, layout: AdapterLayout, client: ClientTokens, start_P: torch.Tensor, result: Result
) -> AtHome:
    """Return the adapter with the lowest loss on the rows that choose; of equal ones that of fewest steps."""
    vectors = {0: start_P} | {count: start_P + delta.float() for count, delta in result.snapshots.items()}

    def losses(rows: tuple[Encoded, ...], counts: Sequence[int]) -> dict[int, float]:
        jobs = [EvaluationJob(str(count), vectors[count], rows, layout) for count in counts]
        found = {int(answer.client_id): answer.loss for answer in engine.evaluate(jobs)}
        if len(counts) > 1 and not all(map(math.isfinite, found.values())):
            # In one pass a diverged adapter may spoil the others.
            return {count: losses(rows, [count])[count] for count in counts}
        return found

    choosing, measuring = split_held_out(client.held_out)
    found = losses(choosing, list(vectors))
    # No number, as of training that diverged, is never the least.
    best = min(found, key=lambda count: found[count] if math.isfinite(found[count]) else math.inf)
    return AtHome(vectors[best], best, found, losses(measuring, sorted({0, best, max(vectors)})))
