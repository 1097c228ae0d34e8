"""What a run computes, counted: more of anything costs more, and the parts add up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedllm.config.run_config import RunConfig
from fedllm.models.base import choose_model, layout_of, load_base
from fedllm.plan.run_plan import resolve
from scripts.work import Work, matrix_rate, memory_of, rounds_at_home, seconds_of, size_of, work_of


def work(**flat: Any) -> Work:
    return work_of(resolve(RunConfig.from_flat(flat)), tokens_a_round=1000.0, held_out_tokens=100.0)


def test_the_parts_of_a_plain_run_are_counted() -> None:
    plain = work(**{"federation.num-rounds": 5})
    assert plain == Work(training=2 * 5 * 1000.0, evaluation=2 * 100.0, distillation=0.0)
    assert plain.total == 10_200.0


@pytest.mark.parametrize(
    ("part", "flat"),
    [
        ("training", {"federation.num-rounds": 9}),
        ("training", {"personal.mode": "dual"}),
        ("training", {"personal.mode": "finetune"}),
        ("evaluation", {"personal.mode": "finetune"}),
        ("evaluation", {"evaluation.every": 1}),
        ("evaluation", {"personal.mode": "dual"}),
        ("distillation", {"distill.when": "last"}),
        ("evaluation", {"distill.when": "last"}),  # clients judge it
    ],
)
def test_what_a_run_adds_costs_more(part: str, flat: dict[str, Any]) -> None:
    base = {"federation.num-rounds": 5}
    assert getattr(work(**{**base, **flat}), part) > getattr(work(**base), part)


def test_training_at_home_costs_the_rounds_once_more_and_its_own_steps() -> None:
    keys = {"federation.num-rounds": 5, "federation.num-clients": 8, "personal.mode": "finetune"}
    plan = resolve(RunConfig.from_flat({**keys, "train.local-steps": 4, "personal.steps": 8}))
    assert rounds_at_home(plan) == 5 + 2 * 8 / 4
    some = resolve(plan.config.override({"federation.cohort": 2}))
    assert rounds_at_home(some) == 5 + 4 * 2 * 8 / 4


def test_distillation_after_every_round_costs_as_often() -> None:
    last, every = (work(**{"distill.when": when, "federation.num-rounds": 4}) for when in ("last", "every"))
    assert every.distillation == 4 * last.distillation


def test_size_counts_what_a_token_is_multiplied_with(load_tiny: Callable) -> None:
    model = load_tiny("llama").model
    size = size_of(model)
    assert size.parameters == size.multiplying == sum(each.numel() for each in model.parameters())  # tied
    assert (size.num_layers, size.hidden) == (2, 32)


def test_memory_and_time_grow_with_their_causes(make_model_folder: Callable) -> None:
    config = RunConfig.from_flat({"model.name": str(make_model_folder()), "model.device": "cpu"})
    base = load_base(config.model)
    size, chosen = size_of(base.model), choose_model(config.model)

    def memory(**flat: Any) -> float:
        changed = config.override(flat)
        layout = layout_of(base.model, changed.lora, base.fingerprint)
        return memory_of(resolve(changed), layout, size, chosen, 50.0)

    least = memory()
    for flat in ({"lora.rank": 64}, {"federation.num-clients": 64}, {"train.batch-size": 64}):
        assert memory(**flat) > least
    done = Work(training=1000.0, evaluation=0.0, distillation=0.0)
    assert seconds_of(done, size, 1e9) == 2 * seconds_of(done, size, 2e9) > 0


def test_the_rate_of_this_machine_is_measured() -> None:
    assert matrix_rate(torch.device("cpu"), torch.float32) > 0
    assert matrix_rate(torch.device("cpu"), torch.bfloat16) > 0
