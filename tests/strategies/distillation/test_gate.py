"""What the gate of a distilled adapter wants: of the losses, of the clients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.plan.run_plan import distillation_of, resolve
from fedllm.runs.records import DistillationLosses, LossChange
from strategies.distillation.gate import ask_clients, judge_losses
from strategies.distillation.losses import Loss, error_of_gain
from tests.strategies.distillation.builders import CHEAP, PRIVATE, STEP, steps_of


def judge(
    *, after: float = 2.0, ensemble: float = 1.0, asks_clients: bool = False, **others: Any
) -> tuple[bool, str]:
    """Return the verdict on losses on public text; the aggregate's is 3."""
    losses = DistillationLosses(base=4.0, ensemble=ensemble, held_out=LossChange(3.0, after), **others)
    return judge_losses(losses, "public", asks_clients=asks_clients)


@pytest.mark.parametrize(
    ("after", "kept"), [(2.0, True), (3.0, False), (3.1, False), (float("nan"), False), (float("inf"), False)]
)
def test_the_gate_wants_a_lower_loss(after: float, kept: bool) -> None:
    assert judge(after=after)[0] is kept


def test_a_gain_within_its_standard_error_is_not_followed() -> None:
    assert judge(after=2.9, error=0.09)[0]
    kept, reason = judge(after=2.9, error=0.11)
    assert not kept
    assert reason == "the held-out public loss improved by no more than its standard error, 0.1100"


def test_the_error_of_a_gain_is_that_of_a_ratio_over_texts() -> None:
    """Equal lengths: the textbook standard error of a mean. Unequal ones: what many samples vary by."""
    old, new = Loss(2.0, {}, ((20.0, 10), (22.0, 10), (18.0, 10))), Loss(1.9, {}, ((19.0, 10),) * 3)
    changes = torch.tensor([-0.1, -0.3, 0.1])
    assert error_of_gain(old, new) == pytest.approx(float(changes.std() / 3**0.5))
    assert error_of_gain(Loss(2.0, {}, ((20.0, 10),)), Loss(1.9, {}, ((19.0, 10),))) == 0.0

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40, (2000, 60), generator=generator)
    gains = tokens * (0.05 + 0.2 * torch.randn(2000, 60, generator=generator))
    errors = []
    for sums, sizes in zip(gains[:200].tolist(), tokens[:200].tolist(), strict=True):
        after, before = tuple(zip(sums, sizes, strict=True)), tuple((0.0, size) for size in sizes)
        errors.append(error_of_gain(Loss(0.0, {}, before), Loss(0.0, {}, after)))
    true = float((gains.sum(dim=1) / tokens.sum(dim=1)).std())
    assert sum(errors) / len(errors) == pytest.approx(true, rel=0.06)


def test_a_teacher_that_knows_no_more_is_not_followed() -> None:
    assert judge(ensemble=2.9)[0]
    for teacher in (2.985, 3.0, 3.5, float("nan")):  # below 3 by no more than what no student gained from
        kept, reason = judge(ensemble=teacher)
        assert not kept
        assert "nothing to teach" in reason


def test_the_gate_refuses_what_forgets_the_clients_own_texts() -> None:
    assert judge(own=LossChange(2.5, 2.5))[0]
    kept, reason = judge(own=LossChange(2.5, 2.6))
    assert not kept
    assert reason == "the loss on texts that the clients' adapters write would rise from 2.5000 to 2.6000"
    assert judge(own=LossChange(2.5, 2.6), asks_clients=True)[0], "clients are asked about their own rows"


def test_clients_roll_back_what_would_worsen_their_own_loss(trained: Callable) -> None:
    session, _, after, _ = trained()
    noise = torch.randn(after.adapter.layout.size, generator=torch.Generator().manual_seed(0))
    worse = replace(after, adapter=AdapterState(after.adapter.layout, 2.0 * noise))
    state, record, held_out = ask_clients(session, after, worse, STEP)
    assert state is after
    assert not record.kept
    assert record.losses.clients.after > record.losses.clients.before
    assert "would rise" in record.reason
    state, record, again = ask_clients(session, worse, after, STEP)
    assert state is after
    assert record.kept
    assert again == held_out, "the losses are those of the adapter that is kept"


def test_clients_who_measure_nothing_accept_nothing(make_config: Callable, open_run: Callable) -> None:
    opened = open_run(make_config({"data.held-out-fraction": 0.0}))
    state, record, _ = ask_clients(opened.session, opened.state, replace(opened.state), STEP)
    assert state is opened.state
    assert not record.kept


@pytest.mark.soak
def test_the_gate_of_clients_measures_in_the_round_itself(run: Callable, public_file: str) -> None:
    plain, _ = run("plain", **{"evaluation.every": 1, "federation.num-rounds": 1})
    flat = {**CHEAP, "distill.text": public_file, "distill.gate": "clients", "evaluation.every": 1}
    state, _ = run("gated", **flat)
    for record in state.records[1:]:
        step = record.distillation
        assert step is not None
        clients = step.losses.clients
        if clients is not None:
            kept = clients.after if step.kept else clients.before
            assert record.mean_held_out == pytest.approx(kept)
            assert step.kept is (clients.after <= clients.before)
    first = state.records[1].distillation
    assert first is not None
    assert first.losses.clients.before == pytest.approx(plain.records[1].mean_held_out)


@pytest.mark.parametrize(
    ("flat", "asked"),
    [
        ({}, True),
        ({"distill.gate": "public"}, False),
        ({"distill.text": "rows.jsonl"}, True),
        ({"distill.text": "synthetic+rows.jsonl"}, True),
        ({"distill.text": "rows.jsonl", "distill.gate": "public"}, False),
        ({"data.held-out-fraction": 0.0}, False),
        ({"privacy.epsilon": 8.0}, True),  # of rows; those held out are nobody's training
        (PRIVATE, False),
    ],
)
def test_clients_judge_where_nothing_else_can(flat: dict[str, Any], asked: bool) -> None:
    plan = resolve(RunConfig.from_flat({"distill.when": "last", **flat}))
    assert distillation_of(plan).asks_clients is asked


@pytest.mark.soak
def test_synthetic_text_alone_is_judged_by_the_clients_too(run: Callable) -> None:
    state, _ = run("asked", **{**CHEAP, "distill.gate": "auto", "distill.when": "last"})
    (step,) = steps_of(state)
    clients = step.losses.clients
    assert clients is not None
    assert step.kept is (clients.after <= clients.before)
