"""Two clients that learnt opposite things, their mean, and what distilling the ensemble back gives."""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch

from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.keys import LoraConfig
from fedllm.distillation.sample import sample_texts
from fedllm.distillation.student import StudentTraining, distil, supervised
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job
from fedllm.messages import LocalTraining
from fedllm.models.base import layout_of
from fedllm.models.chat import Encoded

START = 5


def counting(step: int, number: int, seed: int) -> tuple[Encoded, ...]:
    """Return texts that count by `step` through twenty tokens from a random one: a client's language."""
    generator = random.Random(seed)
    rows = []
    for _ in range(number):
        begin = generator.randrange(20)
        tokens = (START, *(10 + (begin + step * place) % 20 for place in range(12)))
        rows.append(Encoded(tokens, tokens))
    return tuple(rows)


def losses(engine: Engine, vector: torch.Tensor) -> list[float]:
    """Return the held-out loss of an adapter on either client's language."""
    jobs = [EvaluationJob(str(step), vector, counting(step, 10, 100 + step)) for step in (1, -1)]
    return [found.loss for found in engine.evaluate(jobs)]


def test_text_that_clients_wrote_brings_their_mean_nearer(
    load_tiny: Callable,
) -> None:
    """No public text: after a start token the clients' adapters write what the student learns from."""
    base = load_tiny("llama", "float32")
    model = deepcopy(base.model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    base = replace(base, model=model)
    layout = layout_of(model, LoraConfig(rank=4, alpha=12.0), base.fingerprint)
    engine, start = Engine(base, layout, token_budget=512), initial_adapter(layout, 0).vector
    numbers = LocalTraining(steps=150, batch_size=8, learning_rate=1e-2, weight_decay=0.0, clip_norm=1.0)
    jobs = []
    for step in (1, -1):
        rows = counting(step, 1200, step)
        batches = tuple(rows[begin : begin + 8] for begin in range(0, 1200, 8))
        jobs.append(Job(str(step), start, batches, numbers))
    adapters = tuple(start + result.delta for result in engine.train(jobs))
    mean = AdapterState(layout, torch.stack(adapters).mean(dim=0))
    before = losses(engine, mean.vector)
    held_out = counting(1, 10, 101) + counting(-1, 10, 99)
    teachers = {
        kind: Teacher(adapters, layout, torch.ones(2), kind)
        for kind in ("posterior", "uniform", "logit-mean")
    }
    ceilings = {kind: teach(engine, each, held_out, top_k=64).loss for kind, each in teachers.items()}
    aggregate = sum(before) / 2
    assert ceilings["posterior"] < ceilings["uniform"] < ceilings["logit-mean"] < aggregate

    written = sample_texts(
        engine, adapters, torch.ones(2), [(START,)], number=128, max_tokens=12, seed=0
    ).rows
    training = StudentTraining(steps=60, batch_size=16, learning_rate=5e-3, seed=0)
    targets = teach(engine, teachers["posterior"], written, top_k=64)
    after = losses(engine, distil(engine, mean, targets, training).adapter.vector)
    control = losses(engine, supervised(engine, mean, written, training).adapter.vector)
    assert all(new < old for new, old in zip(after, before, strict=True)), "no client pays for the other"
    closed = (aggregate - sum(after) / 2) / (aggregate - ceilings["posterior"])
    assert closed > 0.2
    assert sum(after) < sum(control), "a distribution teaches more than a sample of it"
