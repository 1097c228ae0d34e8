"""Kinds of trials that are no federation: what the same rows give without one.

Both take exactly the rows, in exactly the order, that the clients of the federation would draw, cut into the
same steps, and the same number of steps. One thing is in their favour: their optimizer is never reset, while
every client's starts afresh each round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from clients.data_holder import DataHolder
from clients.process import Process
from clients.tokens import ClientTokens
from fedllm.config.run_config import RunConfig
from fedllm.data.shards import draw_rows
from fedllm.engine.jobs import EvaluationJob, Job
from fedllm.messages import LocalTraining
from fedllm.models.chat import Encoded
from fedllm.plan.run_plan import resolve
from scripts.experiments.runs import losses
from scripts.studies.trials import Figures, Setting, Trial


def pooled(trial: Trial, setting: Setting) -> Figures:
    """Train one adapter on all clients' rows together: step t takes what every client takes in its step t."""
    config = setting.config(trial)
    holder = holder_of(config)
    clients = list(holder.clients.values())
    by_client = [batches_of(client, config) for client in clients]
    batches = tuple(tuple(row for batch in step for row in batch) for step in zip(*by_client, strict=True))
    start = holder.initial.vector
    training = training_of(config, len(batches), config.train.batch_size * len(clients))
    (result,) = holder.engine.train([Job("pooled", start, batches, training)])
    before = evaluate(holder, dict.fromkeys(holder.clients, start))
    after = evaluate(holder, dict.fromkeys(holder.clients, start + result.delta))
    return {**losses(before, after), "tokens": result.num_tokens}


def alone(trial: Trial, setting: Setting) -> Figures:
    """Train every client alone; with the option `everywhere` also measure each adapter on all clients' rows.

    `mean_after` is over clients of the loss on their own rows, `union_after` of the loss on everybody's.
    """
    config = setting.config(trial)
    holder = holder_of(config)
    start = holder.initial.vector
    jobs = []
    for client in holder.clients.values():
        batches = batches_of(client, config)
        jobs.append(
            Job(client.client_id, start, batches, training_of(config, len(batches), config.train.batch_size))
        )
    results = list(holder.engine.train(jobs))
    adapters = {result.client_id: start + result.delta for result in results}
    figures = losses(evaluate(holder, dict.fromkeys(holder.clients, start)), evaluate(holder, adapters))
    figures["tokens"] = sum(result.num_tokens for result in results)
    if trial.options.get("everywhere"):
        union = [evaluate(holder, dict.fromkeys(holder.clients, vector)) for vector in adapters.values()]
        means = [sum(each.values()) / len(each) for each in union]
        figures["union_after"] = sum(means) / len(means)
    return figures


def holder_of(config: RunConfig) -> DataHolder:
    """Return a holder of all clients of a run."""
    return Process().open(config.to_flat(), {"server-paths": True})


def batches_of(client: ClientTokens, config: RunConfig) -> tuple[tuple[Encoded, ...], ...]:
    """Return the rows of all steps of all rounds of a client, as its rounds would draw them."""
    size, num_steps = config.train.batch_size, config.train.local_steps * config.federation.num_rounds
    drawn = draw_rows(
        len(client.train), seed=config.seed, client_id=client.client_id, start=0, count=size * num_steps
    )
    rows = [client.train[index] for index in drawn]
    return tuple(tuple(rows[step * size : (step + 1) * size]) for step in range(num_steps))


def training_of(config: RunConfig, steps: int, batch_size: int) -> LocalTraining:
    """Return the numbers of one uninterrupted training."""
    return replace(resolve(config).training(1), steps=steps, batch_size=batch_size)


def evaluate(holder: DataHolder, adapters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the held-out loss of every client under its adapter [P]."""
    jobs: Sequence[EvaluationJob] = [
        EvaluationJob(client_id, vector, holder.clients[client_id].held_out)
        for client_id, vector in adapters.items()
        if holder.clients[client_id].held_out
    ]
    return {answer.client_id: answer.loss for answer in holder.engine.evaluate(jobs)}
