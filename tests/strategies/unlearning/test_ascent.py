"""Ascent: its gradient is that of the loss it states, it ends at the base model, and it forgets a row."""

from collections.abc import Callable

import pytest
import torch

from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.attacks.token_scores import no_adapter, score, whole
from fedllm.distillation.student import StudentTraining, supervised
from fedllm.distillation.targets import BucketDivergence, forward_kl
from fedllm.engine.engine import Engine
from strategies.unlearning.ascent import AwayFromTokens, ascend, away_from
from tests.builders import engine_on, random_texts


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_ascent_is_that_of_its_loss(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, base = (torch.randn(6, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(30, (6,), generator=generator)
    base_log = base.log_softmax(dim=1)
    ids = torch.arange(30).expand(6, -1)
    buckets = torch.cat([base_log, torch.full((6, 1), -700.0, dtype=torch.float64)], dim=1)
    said = base_log.gather(1, tokens[:, None])[:, 0]
    criterion = AwayFromTokens(BucketDivergence(ids, buckets, forward_kl), tokens, said)
    losses, gradient = criterion(slice(0, 6), logits.clone(), True)

    wanted = logits.clone().requires_grad_()
    log_probs = wanted.log_softmax(dim=1)
    lead = (log_probs.gather(1, tokens[:, None])[:, 0] - said).clamp(min=0)
    expected = lead + (base_log.exp() * (base_log - log_probs)).sum(dim=1)
    (by_autograd,) = torch.autograd.grad(expected.sum(), wanted)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradient, by_autograd)


@pytest.fixture(scope="module")
def engine(load_tiny: Callable) -> Engine:
    return engine_on(load_tiny(), rank=4)


def loss_of(engine: Engine, adapter: AdapterState, rows: list) -> float:
    (scores,) = score(engine, [adapter.vector], rows)
    return -float(torch.cat([one.log_probs for one in scores]).mean())


def test_ascent_stops_at_the_base_or_where_held_out_rows_are_as_known(engine: Engine) -> None:
    rows = [whole(text) for text in random_texts([12, 12, 12, 12])]
    numbers = {"batch_size": 4, "learning_rate": 0.02, "seed": 0}
    start = initial_adapter(engine.layout, 0)
    learnt = supervised(engine, start, rows, StudentTraining(steps=30, **numbers)).adapter
    objective, training = away_from(engine, rows), StudentTraining(steps=24, **numbers)
    # The very rows as held out: they are never better known than themselves, so the first stop will do.
    first = ascend(engine, learnt, objective, rows, training)
    last = ascend(engine, learnt, objective, [], training)
    base = loss_of(engine, AdapterState(engine.layout, no_adapter(engine)), rows)
    losses = [loss_of(engine, adapter, rows) for adapter in (learnt, first, last)]
    assert losses == sorted(losses)
    assert losses[0] < base - 0.3  # it knew them
    assert base <= losses[2] < base + 0.3  # ascent alone would go on
