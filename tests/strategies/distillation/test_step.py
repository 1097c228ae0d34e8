"""One distillation step: who is heard, what it measures, and that its failure costs no round."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.adapters.layout import AdapterState
from strategies.distillation.ending import try_step
from strategies.distillation.report import describe_step, table_cell
from strategies.distillation.step import open_engine
from strategies.distillation.teachers import ClientAdapter
from strategies.rounds import next_round
from tests.strategies.distillation.builders import CHEAP, NAMES, with_keys, with_public


@pytest.mark.soak
def test_a_local_server_has_the_engine_of_its_clients(make_config: Callable, open_run: Callable) -> None:
    opened = open_run(make_config(CHEAP))
    next_round(opened.session, opened.state)
    assert open_engine(opened.session) is opened.holder(2).engine


def test_a_step_that_cannot_open_the_base_model_costs_no_round(trained: Callable) -> None:
    session, before, after, adapters = trained()
    elsewhere = with_keys(session, **{"model.name": "/nowhere"})
    adapter, step = try_step(elsewhere, before, after, adapters)
    assert adapter is after.adapter
    assert not step.kept
    assert step.losses is None
    assert "\n" not in describe_step(step)
    assert describe_step(step).startswith("not distilled: ")
    assert describe_step(step).endswith("the aggregate stays")
    assert table_cell(step) == "refused"


def test_without_a_teacher_the_aggregate_stays(trained: Callable) -> None:
    session, before, after, _ = trained()
    adapter, step = try_step(session, before, after, ())
    assert adapter is after.adapter
    assert "no client of the round is left to teach" in step.reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(MemoryError(), "out of memory", marks=pytest.mark.soak),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "out of memory"),
        (RuntimeError("first line\nsecond"), "it failed: first line"),
    ],
)
def test_whatever_fails_in_a_step_is_one_line(
    error: Exception, words: str, trained: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: Any, **also_unused: Any) -> None:
        raise error

    monkeypatch.setattr("strategies.distillation.learn.distil", fail)
    session, before, after, adapters = trained()
    adapter, step = try_step(session, before, after, adapters)
    assert adapter is after.adapter
    assert words in step.reason
    assert "\n" not in describe_step(step)


def test_every_client_is_heard_where_its_own_text_is(trained: Callable, public_file: str) -> None:
    session, before, after, adapters = trained()
    adapter, step = try_step(with_public(session, public_file), before, after, adapters)
    assert set(step.teachers.weights) == set(NAMES)
    for domain, weights in step.teachers.weights.items():
        assert weights[domain] > 0.99, "from the first token on, for a whole text tells whose it is"
    assert step.kept
    losses = step.losses
    assert losses.ensemble < losses.held_out.after < losses.held_out.before < losses.base
    assert 0 < losses.gap_closed < 1
    assert adapter.digest != after.adapter.digest


def test_a_garbage_client_loses_its_weight(trained: Callable, public_file: str) -> None:
    session, before, after, adapters = trained()
    noise = torch.randn(after.adapter.layout.size, generator=torch.Generator().manual_seed(0))
    garbage = ClientAdapter("mallory", sum(adapter.weight for adapter in adapters), 2.0 * noise)
    _, step = try_step(with_public(session, public_file), before, after, (*adapters, garbage))
    assert step.teachers.kind == "posterior"
    for weights in step.teachers.weights.values():
        assert weights["mallory"] < 0.01, "though before a text is read it has half of all weight"
    assert step.kept


def unlearnt(adapter: AdapterState) -> torch.Tensor:
    """Return an adapter [P] that expects what was learnt less than the base model does: B turned round."""
    turned = adapter.vector.clone()
    for _, b in adapter.layout.factors(turned):
        b *= -0.2
    return turned


def test_public_text_nobody_knows_weighs_all_clients_alike(
    trained: Callable, make_model_folder: Callable, public_file: str
) -> None:
    session, before, after, adapters = trained(**{"model.name": str(make_model_folder())})
    layout = after.adapter.layout
    lost = [
        replace(adapter, vector=unlearnt(AdapterState(layout, adapter.vector)), weight=1.0 + number)
        for number, adapter in enumerate(adapters)
    ]
    _, step = try_step(with_public(session, public_file), before, after, lost)
    assert step.teachers.kind == "uniform"
    assert "in no client's support" in step.reason
    for weights in step.teachers.weights.values():
        assert list(weights.values()) == pytest.approx([0.25] * 4)


def test_prompts_that_leave_no_room_for_an_answer_are_refused(trained: Callable) -> None:
    session, before, after, adapters = trained()
    flat = {"distill.max-tokens": 8, "evaluation.prompts": "a prompt longer than the whole text is"}
    adapter, step = try_step(with_keys(session, **flat), before, after, adapters)
    assert adapter is after.adapter
    assert "distill.max-tokens: the shortest prompt" in step.reason


@pytest.mark.parametrize("teacher", ["uniform", pytest.param("logit-mean", marks=pytest.mark.soak)])
def test_other_teachers_teach_as_they_are_named(teacher: str, trained: Callable, public_file: str) -> None:
    session, before, after, adapters = trained()
    changed = with_public(session, public_file, **{"distill.teacher": teacher})
    _, step = try_step(changed, before, after, adapters)
    assert step.teachers.kind == teacher
    assert step.losses.ensemble > 0


def test_a_teacher_that_is_the_aggregate_teaches_nothing(trained: Callable, public_file: str) -> None:
    session, before, after, _ = trained()
    alone = (ClientAdapter("anna", 1.0, after.adapter.vector),)
    adapter, step = try_step(with_public(session, public_file), before, after, alone)
    assert adapter is after.adapter
    assert step.losses.ensemble == pytest.approx(step.losses.held_out.before, abs=1e-4)
    assert step.losses.held_out.after == step.losses.held_out.before
    assert (step.kept, step.num_tokens, step.target_bytes) == (False, 0, 0)
    assert describe_step(step).startswith(
        "not distilled: there is nothing to teach: the clients' ensemble is "
    )
    assert " (" not in describe_step(step), "no change of a loss is told"


def test_with_public_text_the_clients_own_is_measured_too(trained: Callable, public_file: str) -> None:
    session, before, after, adapters = trained()
    _, step = try_step(with_public(session, public_file), before, after, adapters)
    held_out, own = step.losses.held_out, step.losses.own
    assert step.kept is (held_out.after < held_out.before and own.after <= own.before)


def test_a_step_learns_from_screened_texts_alone(trained: Callable) -> None:
    session, before, after, adapters = trained()
    screened = with_keys(session, **{"distill.originality": "on"})
    _, step = try_step(screened, before, after, adapters)
    texts = step.texts
    assert texts.num_written == 24 + 6
    assert texts.number + texts.num_held_out + texts.num_removed + texts.num_refused == texts.num_written
