"""Many clients in one pass give what each gives alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedllm.adapters.layout import AdapterState, initial_adapter, with_rank
from fedllm.config.keys import LoraConfig
from fedllm.engine.adapter_bank import Segment, segments
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job
from fedllm.engine.kernels import LoopKernel, MaskedKernel
from fedllm.engine.layers import attached
from fedllm.engine.plain import train_plainly
from fedllm.engine.steps import step_gradients
from fedllm.models.attention import ragged
from fedllm.models.base import layout_of
from fedllm.models.chat import IGNORED, Encoded

KINDS = ["llama", "gpt2", "gemma3"]
KERNELS = [LoopKernel(), MaskedKernel()]
EXACT = {"rtol": 0, "atol": 1e-12}


def uneven_jobs(engine: Engine, make_job: Callable) -> list[Job]:
    """Five clients that differ in everything: rows, lengths, steps, rates, clipping, decay."""
    numbers = [
        {"steps": 3, "batch_size": 3},
        {"steps": 1, "batch_size": 5, "learning_rate": 3e-2},
        {"steps": 2, "batch_size": 1, "clip_norm": 0.01},
        {"steps": 4, "batch_size": 2, "weight_decay": 0.2},
        {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "clip_norm": 0.05},
    ]
    return [
        make_job(engine.layout, name, seed, **n)
        for seed, (name, n) in enumerate(zip("abcde", numbers, strict=True))
    ]


@pytest.mark.parametrize("kernel", KERNELS, ids=["loop", "masked"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_budget", [60, 100_000])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_fused_clients_equal_each_alone_through_peft(
    kind: str, kernel: object, token_budget: int, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine(kind, token_budget=token_budget)
    engine.bank.kernel = kernel
    jobs = uneven_jobs(engine, make_job)
    results = list(engine.train(jobs))
    assert [result.client_id for result in results] == list("abcde")
    for job, result in zip(jobs, results, strict=True):
        alone = train_plainly(engine.base, engine.layout, job)
        assert float(alone.abs().max()) > 1e-4
        torch.testing.assert_close(result.delta, alone, **EXACT)


@pytest.mark.parametrize("kernel", KERNELS, ids=["loop", "masked"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_rows_that_begin_alike_train_as_if_each_stood_alone(
    kind: str, kernel: object, make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    """As rows of one chat template do; the prefix is laid out once per client and step.

    The norms of llama and gemma3 take gradients through float32 whatever the model's type, so a prefix's
    summed gradient rounds otherwise than the sum of its rows' rounded ones; gpt2's do not.
    """
    tolerance = EXACT if kind == "gpt2" else {"rtol": 0, "atol": 1e-6}
    engine = make_engine(kind, token_budget=100_000)
    engine.bank.kernel = kernel
    (prefix,) = make_rows([11], seed=77)

    def begun(row: Encoded) -> Encoded:
        return Encoded(prefix.tokens + row.tokens, (IGNORED,) * 11 + row.labels)

    jobs = [
        replace(job, batches=tuple(tuple(map(begun, batch)) for batch in job.batches))
        for job in uneven_jobs(engine, make_job)
    ]
    for job, result in zip(jobs, engine.train(jobs), strict=True):
        alone = train_plainly(engine.base, engine.layout, job)
        torch.testing.assert_close(result.delta, alone, **tolerance)


@pytest.mark.parametrize("kernel", KERNELS, ids=["loop", "masked"])
@pytest.mark.parametrize("token_budget", [60, 100_000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_dropout_is_a_rows_own_whoever_it_shares_a_pass_with(
    kind: str, token_budget: int, kernel: object, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine(kind, token_budget=token_budget)
    engine.bank.kernel = kernel
    jobs = [
        replace(job, training=replace(job.training, dropout=rate), seed=number)
        for number, (job, rate) in enumerate(
            zip(uneven_jobs(engine, make_job), [0.3, 0.0, 0.5, 0.1, 0.3], strict=True)
        )
    ]
    for job, result in zip(jobs, engine.train(jobs), strict=True):
        alone = train_plainly(engine.base, engine.layout, job)
        torch.testing.assert_close(result.delta, alone, **EXACT)
        without = train_plainly(engine.base, engine.layout, replace(job, seed=job.seed + 100))
        assert torch.equal(alone, without) == (job.training.dropout == 0)


@pytest.mark.parametrize("kernel", KERNELS, ids=["loop", "masked"])
def test_fusing_in_float32_moves_values_by_a_hundredth_step(
    kernel: object, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", "float32", token_budget=100_000)
    engine.bank.kernel = kernel
    jobs = uneven_jobs(engine, make_job)
    fused = list(engine.train(jobs))
    engine.token_budget = 1
    for job, together, alone in zip(jobs, fused, engine.train(jobs), strict=True):
        gap = (together.delta - alone.delta).abs().max()
        assert float(gap) < 1e-2 * job.training.learning_rate


def test_order_and_grouping_of_clients_do_not_matter(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", token_budget=100_000)
    jobs = uneven_jobs(engine, make_job)
    expected = {result.client_id: result for result in engine.train(jobs)}
    for order in ([4, 2, 0, 1, 3], [1, 0], [3]):
        for result in engine.train([jobs[place] for place in order]):
            torch.testing.assert_close(result.delta, expected[result.client_id].delta, **EXACT)
            assert result.loss == pytest.approx(expected[result.client_id].loss, rel=1e-12)


def test_a_client_that_has_finished_never_moves_again(make_engine: Callable, make_job: Callable) -> None:
    """Weight decay and momentum would move it at once if its row were still stepped."""
    engine = make_engine("llama", "float32", token_budget=100_000)
    short = make_job(engine.layout, "short", 0, steps=1, weight_decay=0.9)
    long = make_job(engine.layout, "long", 1, steps=6, weight_decay=0.9)
    (twice, _), (once, _) = (
        engine.train([short, long]),
        engine.train([short, replace(long, batches=long.batches[:1])]),
    )
    assert torch.equal(twice.delta, once.delta)


@pytest.mark.parametrize("kernel", KERNELS, ids=["loop", "masked"])
def test_diverging_client_leaves_neighbours_as_if_alone(
    kernel: object, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", token_budget=100_000)
    engine.bank.kernel = kernel
    sound = [make_job(engine.layout, name, seed) for seed, name in enumerate("ab")]
    wild = make_job(engine.layout, "wild", 5, learning_rate=1e300)
    first, lost, last = engine.train([sound[0], wild, sound[1]])
    assert not bool(torch.isfinite(lost.delta).all())
    for job, result in zip(sound, (first, last), strict=True):
        torch.testing.assert_close(result.delta, train_plainly(engine.base, engine.layout, job), **EXACT)


@pytest.mark.parametrize("kernel", KERNELS, ids=["loop", "masked"])
def test_ranks_may_differ_in_one_pass(kernel: object, make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", token_budget=100_000)  # rank 2
    engine.bank.kernel = kernel
    lora = LoraConfig(rank=1, alpha=6.0)
    narrow = layout_of(engine.base.model, lora, engine.base.fingerprint)
    jobs = [make_job(engine.layout, "wide", 0), replace(make_job(narrow, "narrow", 1), layout=narrow)]
    wide, small = engine.train(jobs)
    torch.testing.assert_close(wide.delta, train_plainly(engine.base, engine.layout, jobs[0]), **EXACT)
    torch.testing.assert_close(small.delta, train_plainly(engine.base, narrow, jobs[1]), **EXACT)


def test_growing_and_shrinking_a_rank_undo_each_other(make_engine: Callable) -> None:
    layout = make_engine("llama").layout
    vector = torch.randn(layout.size)
    wider = replace(layout, rank=5)
    grown = with_rank(vector, layout, 5)
    assert torch.equal(with_rank(grown, wider, layout.rank), vector)
    for (a, b), (big_a, big_b) in zip(layout.factors(vector), wider.factors(grown), strict=True):
        torch.testing.assert_close(big_b @ big_a, b @ a)


def _step(engine: Engine, jobs: list[Job]) -> torch.Tensor:
    engine.bank.load(engine.layout, [job.start for job in jobs], [engine.layout.scale] * len(jobs))
    with attached(engine.base.model, engine.bank), ragged(engine.base.model):
        return step_gradients(engine.passes, engine.limits, jobs, 0)[0].clone()


@pytest.mark.parametrize("kernel", KERNELS, ids=["loop", "masked"])
@pytest.mark.parametrize("token_budget", [40, 100_000])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_example_gradients_are_those_of_micro_batches_of_one(
    kind: str, token_budget: int, kernel: object, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine(kind, token_budget=token_budget)
    engine.bank.kernel = kernel
    clip = 0.3
    jobs = [
        replace(make_job(engine.layout, name, seed, steps=1, batch_size=4), example_clip=clip)
        for seed, name in enumerate("abc")
    ]
    private = _step(engine, jobs)
    for job, gradient in zip(jobs, private, strict=True):
        plain = replace(job, example_clip=0.0)
        singles = [_step(engine, [replace(plain, batches=((row,),))])[0] for row in job.batches[0]]
        clipped = [single * min(1.0, clip / float(single.norm())) for single in singles]
        assert min(float(single.norm()) for single in singles) < clip * 100
        torch.testing.assert_close(gradient, sum(clipped) / 4, **EXACT)


def test_private_and_plain_clients_share_a_pass(make_engine: Callable, make_job: Callable) -> None:
    engine = make_engine("llama", token_budget=100_000)
    plain = make_job(engine.layout, "plain", 0)
    private = replace(make_job(engine.layout, "private", 1), example_clip=0.1)
    together = list(engine.train([plain, private]))
    torch.testing.assert_close(together[0].delta, train_plainly(engine.base, engine.layout, plain), **EXACT)
    (alone,) = engine.train([private])
    torch.testing.assert_close(together[1].delta, alone.delta, **EXACT)


def test_many_adapters_are_evaluated_in_one_pass(make_engine: Callable, make_rows: Callable) -> None:
    engine = make_engine("llama", token_budget=100_000)
    vectors = [
        0.2 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    rows = make_rows([5, 9, 14])
    jobs = [EvaluationJob(f"c{i}", vectors[i % 4], rows) for i in range(6)]
    together = engine.evaluate(jobs)
    for job, answer in zip(jobs, together, strict=True):
        (alone,) = engine.evaluate([job])
        assert answer.client_id == job.client_id
        assert answer.loss == pytest.approx(alone.loss, rel=1e-12)
    assert len({round(answer.loss, 9) for answer in together}) == 4


def test_training_goes_on_after_an_evaluation(
    make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    engine = make_engine("llama")
    job = make_job(engine.layout)
    (before,) = engine.train([job])
    engine.bank.theta_CP = engine.bank.theta_CP[:0]
    engine.evaluate([EvaluationJob("a", job.start, make_rows([5]))])
    (after,) = engine.train([job])
    assert torch.equal(after.delta, before.delta)


def test_many_adapters_answer_in_one_batch(make_engine: Callable) -> None:
    engine = make_engine("llama", "float32")
    states = [
        AdapterState(
            engine.layout, torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(i))
        )
        for i in range(3)
    ]
    prompts = ["Return.", "Open a file and read its lines.", "Sort"]
    together = engine.generate(states, prompts, 5)
    alone = [engine.generate([state], [prompt], 5)[0] for state, prompt in zip(states, prompts, strict=True)]
    assert together == alone


def test_neighbouring_runs_of_a_row_are_one_segment() -> None:
    assert segments([3, 2, 4, 1], [0, 0, 1, 0]) == (Segment(0, 5, 0), Segment(5, 9, 1), Segment(9, 10, 0))


def test_a_plain_text_is_continued_and_not_asked(make_engine: Callable) -> None:
    engine = make_engine("llama", "float32")
    seen: list[list[int]] = []
    hook = engine.base.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(given[0][0].tolist())
    )
    with hook:
        for as_plain_text in (True, False):
            engine.generate([initial_adapter(engine.layout, 0)], ["Sort the"], 1, as_plain_text=as_plain_text)
    plain, asked = map(engine.base.tokenizer.decode, seen)
    assert plain == "Sort the"
    assert asked.startswith("<|user|>Sort the")
    assert asked.endswith("<|assistant|>")
