"""The engine against its plain twin, and what it leaves behind."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from clients.protect import Protection, protect
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.engine.plain import train_plainly
from fedllm.errors import LayoutError, NonFiniteError
from fedllm.models.base import layout_of, load_base
from fedllm.models.chat import Encoded

KINDS = ["llama", "gpt2", "gemma3"]
EXACT = {"rtol": 0, "atol": 1e-12}


def only(results: Any) -> Any:
    (result,) = results
    return result


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *((kind, "all-linear") for kind in KINDS),
        ("llama", "q_proj,v_proj"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt2", "c_attn"),
        ("gemma3", "k_proj,up_proj"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_engine_and_its_plain_twin_give_the_same_delta(
    kind: str, targets: str, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine(kind, "float64", targets)
    job = make_job(engine.layout)
    assert engine.is_ragged
    plain = train_plainly(engine.base, engine.layout, job)
    assert float(plain.abs().max()) > 1e-3
    torch.testing.assert_close(only(engine.train([job])).delta, plain, **EXACT)


def test_kernels_are_launched_on_the_banks_device(
    make_engine: Callable, make_job: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, current = make_engine(), []
    found = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: current.append(tensor) or found(tensor))
    job = make_job(engine.layout)
    for work in (
        lambda: only(engine.train([job])),
        lambda: engine.evaluate([EvaluationJob("a", job.start, job.batches[0])]),
        lambda: engine.generate([AdapterState(engine.layout, job.start)], ["Sort"], 1),
    ):
        current.clear()
        work()
        assert current == [engine.bank.tap]


def test_a_cpu_may_have_a_number(make_engine: Callable, make_job: Callable) -> None:
    engine, named = make_engine(), make_engine(device="cpu:0")
    found, expected = (only(one.train([make_job(engine.layout)])) for one in (named, engine))
    assert torch.equal(found.delta, expected.delta)


@pytest.mark.parametrize(
    "numbers",
    [
        {"clip_norm": 0.01},
        {"clip_norm": 1e6},
        {"weight_decay": 0.3},
        {"clip_norm": 0.05, "weight_decay": 0.1, "steps": 5, "batch_size": 1},
        {"steps": 1, "batch_size": 7},
    ],
)
def test_they_agree_under_clipping_and_weight_decay(
    numbers: dict[str, Any], make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", "float64", "all-linear")
    job = make_job(engine.layout, seed=3, **numbers)
    plain = train_plainly(engine.base, engine.layout, job)
    torch.testing.assert_close(only(engine.train([job])).delta, plain, **EXACT)


def test_clipping_and_weight_decay_change_the_delta(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "float64", "all-linear")
    deltas = [
        only(engine.train([make_job(engine.layout, **numbers)])).delta
        for numbers in ({}, {"clip_norm": 1e-9}, {"weight_decay": 0.3})
    ]
    assert float((deltas[0] - deltas[1]).abs().max()) > 1e-3
    assert float((deltas[0] - deltas[2]).abs().max()) > 1e-4


def test_architecture_that_goes_row_by_row_says_so_in_one_line(
    make_engine: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    make_engine("llama")
    assert not caplog.messages
    make_engine("gemma2")
    assert caplog.messages == [
        "Gemma2ForCausalLM cannot attend over a flat row: its samples are trained one at a time"
    ]


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])  # the last one caps its scores: row by row
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_in_float32_they_agree_to_a_hundredth_of_a_step(
    kind: str, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine(kind, "float32", "all-linear")
    assert engine.is_ragged == (kind != "gemma2")
    job = make_job(engine.layout)
    plain = train_plainly(engine.base, engine.layout, job)
    difference = only(engine.train([job])).delta - plain
    # AdamW divides by the gradient's own size, so rounding moves a value by far less than a step of 1e-2
    assert float(difference.abs().max()) < 1e-4
    assert float(difference.norm() / plain.norm()) < 1e-4


def test_rows_fed_one_by_one_give_the_same_delta(
    make_engine: Callable, make_job: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = make_engine("llama", "float64", "all-linear")
    job = make_job(flat.layout)
    expected = only(flat.train([job])).delta
    monkeypatch.setattr(flat.base.model, "_supports_attention_backend", False)
    row_by_row = Engine(flat.base, flat.layout, token_budget=512)
    assert not row_by_row.is_ragged
    torch.testing.assert_close(only(row_by_row.train([job])).delta, expected, **EXACT)


@pytest.mark.parametrize("limit", [1, 30])
def test_splitting_a_step_into_passes_changes_nothing(
    limit: int, make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    engine = make_engine("llama", "float64", "all-linear")
    job = make_job(engine.layout)
    held_out = EvaluationJob("a", job.start, make_rows([5, 9, 2, 14, 24]))
    whole, measured = only(engine.train([job])), only(engine.evaluate([held_out]))
    engine.token_budget = limit
    split, again = only(engine.train([job])), only(engine.evaluate([held_out]))
    torch.testing.assert_close(split.delta, whole.delta, **EXACT)
    assert split.loss == pytest.approx(whole.loss, rel=1e-12)
    assert again.loss == pytest.approx(measured.loss, rel=1e-12)


def test_result_with_its_own_pass_is_bit_equal_among_any_jobs(
    make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", "float32", "all-linear", token_budget=1)
    jobs = [make_job(engine.layout, name, seed) for seed, name in enumerate("abc")]
    together = {result.client_id: result.delta for result in engine.train(jobs)}
    for job in reversed(jobs):
        assert torch.equal(only(engine.train([job])).delta, together[job.client_id])


def test_evaluating_before_training_changes_no_bit(
    make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    fresh, used = (make_engine("llama", "float32", "all-linear") for _ in range(2))
    job = make_job(fresh.layout)
    used.evaluate([EvaluationJob("a", job.start, make_rows([5, 9]))])
    used.generate([AdapterState(used.layout, job.start)], ["Return the sum."], 2)
    assert torch.equal(only(used.train([job])).delta, only(fresh.train([job])).delta)


def test_diverged_job_is_not_finite_and_harms_no_neighbour(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "float32", "all-linear")
    sound = make_job(engine.layout, "a", 0)
    wild = make_job(engine.layout, "b", 1, learning_rate=1e30)
    expected = only(engine.train([sound])).delta
    first, diverged, last = engine.train([sound, wild, sound])
    assert not bool(torch.isfinite(diverged.delta).all())
    plain = Protection(layout=engine.layout, part="both", weighting="uniform", with_numbers=True)
    with pytest.raises(NonFiniteError):
        protect(diverged, (), 9, 1, plain)
    assert torch.equal(first.delta, expected)
    assert torch.equal(last.delta, expected)


def test_a_snapshot_is_what_so_many_steps_give(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine()
    job = replace(make_job(engine.layout), snapshots=(1, 3))
    brief = only(engine.train([replace(job, batches=job.batches[:1], snapshots=())]))
    alone = only(engine.train([job]))
    *_, among = engine.train([make_job(engine.layout, "b", seed=1, steps=2), job])
    assert set(alone.snapshots) == set(among.snapshots) == {1, 3}
    assert torch.equal(alone.snapshots[1], brief.delta)
    assert torch.equal(alone.snapshots[3], alone.delta)
    torch.testing.assert_close(among.snapshots[1], brief.delta, **EXACT)


def test_a_result_counts_what_was_trained_on(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", "float32", "all-linear")
    job = make_job(engine.layout, "a", 0)
    result = only(engine.train([job]))
    assert result.client_id == "a"
    assert result.num_rows == 9
    assert result.num_tokens == sum(len(row.tokens) for batch in job.batches for row in batch)
    assert result.loss == pytest.approx(5.9, abs=0.5)  # near log(359), the tiny model's vocabulary


def test_an_adapter_of_another_base_model_is_refused(make_engine: Callable) -> None:
    engine = make_engine("llama", "float32", "all-linear")
    with pytest.raises(LayoutError, match="is not the one on this machine"):
        Engine(engine.base, replace(engine.layout, fingerprint="0" * 64), token_budget=512)


def _snapshot(model: Any) -> tuple[Any, ...]:
    modules = [(name, id(module)) for name, module in model.named_modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [parameter.requires_grad or parameter.grad is not None for parameter in model.parameters()]
    return modules, tensors, any(wanted), model.config._attn_implementation, model.training


def _assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert before[2:] == after[2:] == (False, "sdpa", False)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_base_model_is_left_as_it_was(
    kind: str, make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    engine = make_engine(kind, "float32", "all-linear")
    before = _snapshot(engine.base.model)
    job = make_job(engine.layout)
    engine.token_budget = 1
    results = engine.train([job, job])
    next(results)
    _assert_same(before, _snapshot(engine.base.model))  # also between two passes
    list(results)
    engine.evaluate([EvaluationJob("a", job.start, make_rows([5, 9]))])
    engine.generate([AdapterState(engine.layout, job.start)], ["Return the sum."], 3)
    _assert_same(before, _snapshot(engine.base.model))


def test_the_base_model_is_left_as_it_was_when_training_fails(
    make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", "float32", "all-linear")
    before = _snapshot(engine.base.model)
    job = make_job(engine.layout)
    unknown = Encoded((5, 10**6, 7), (-100, 10**6, 7))
    with pytest.raises(IndexError):
        list(engine.train([replace(job, batches=((unknown,),))]))
    _assert_same(before, _snapshot(engine.base.model))
    assert bool(torch.isfinite(only(engine.train([job])).delta).all())


def test_answers_before_training_are_the_base_models_own(make_engine: Callable) -> None:
    engine = make_engine("llama", "float32", "all-linear")
    fresh = initial_adapter(engine.layout, 0)
    other = AdapterState(engine.layout, torch.randn(engine.layout.size))
    prompts = ["Return the sum of two numbers.", "Open a file."]
    answers = engine.generate([fresh] * 2, prompts, 6)
    assert answers == engine.generate([initial_adapter(engine.layout, 1)] * 2, prompts, 6)
    assert answers != engine.generate([other] * 2, prompts, 6)
    tokenizer = engine.base.tokenizer
    assert all(len(tokenizer(answer)["input_ids"]) <= 7 for answer in answers)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_checkpointing_recomputes_layers_and_changes_no_delta(
    kind: str, make_engine: Callable, make_job: Callable, make_model_folder: Callable
) -> None:
    plain = make_engine(kind, "float64")
    job = make_job(plain.layout)
    expected = only(plain.train([job]))
    config = ModelConfig(name=str(make_model_folder(kind)), dtype="float64", gradient_checkpointing=True)
    base = load_base(config)
    lora = LoraConfig(rank=2, alpha=6.0)
    engine = Engine(base, layout_of(base.model, lora, base.fingerprint), token_budget=512)
    calls: list[int] = []
    layer = next(m for m in base.model.modules() if isinstance(m, GradientCheckpointingLayer))
    inner = next(layer.children())
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    found = only(engine.train([job]))
    handle.remove()
    assert len(calls) == 2 * job.training.steps, "once forward, once recomputed"
    torch.testing.assert_close(found.delta, expected.delta, **EXACT)
