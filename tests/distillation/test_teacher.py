"""What a teacher of adapters says, against PEFT and the whole softmax; garbage, groups and bytes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fedllm.distillation import teacher as module
from fedllm.distillation.plain import teach_plainly
from fedllm.distillation.sample import sample_texts
from fedllm.distillation.targets import Targets, target_bytes
from fedllm.distillation.teacher import Teacher, teach
from fedllm.errors import ConfigError, LayoutError, NoDataError, NonFiniteError
from fedllm.models.chat import IGNORED, Encoded

EXACT = {"rtol": 0, "atol": 1e-11}
LENGTHS = [12, 3, 30, 7, 2, 19]
WHOLE = 10**6  # more than any vocabulary: every token is kept


def log_probs_of(targets: Targets) -> torch.Tensor:
    """Return the log-probabilities [N, V] of targets that kept every token."""
    ids = targets.ids_Nk.long()
    return torch.zeros_like(targets.log_probs_Nk).scatter(1, ids, targets.log_probs_Nk)


def assert_same(first: Targets, second: Targets) -> None:
    assert first.rows == second.rows
    torch.testing.assert_close(log_probs_of(first), log_probs_of(second), **EXACT)
    torch.testing.assert_close(first.weights_NK, second.weights_NK, **EXACT)
    torch.testing.assert_close(first.entropy_N, second.entropy_N, **EXACT)
    assert first.loss == pytest.approx(second.loss, rel=1e-11)


@pytest.mark.parametrize(
    "choices", [{}, {"kind": "uniform"}, {"kind": "logit-mean"}, {"temper": 0.4, "floor": 0.2}]
)
@pytest.mark.parametrize("hindsight", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "gemma2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_teacher_and_its_plain_twin_say_the_same(
    kind: str,
    hindsight: bool,
    choices: dict[str, Any],
    make_engine: Callable,
    make_teacher: Callable,
    make_rows: Callable,
) -> None:
    engine = make_engine(kind)
    teacher, rows = make_teacher(engine, **choices), make_rows(LENGTHS, context=0.3)
    targets = teach(engine, teacher, rows, top_k=WHOLE, hindsight=hindsight, dtype=torch.float64)
    plain = teach_plainly(engine.base, teacher, rows, hindsight=hindsight)
    log_probs, weights = (torch.cat(parts) for parts in zip(*plain, strict=True))
    torch.testing.assert_close(log_probs_of(targets), log_probs, **EXACT)
    torch.testing.assert_close(targets.weights_NK, weights, **EXACT)
    torch.testing.assert_close(targets.entropy_N, -(log_probs.exp() * log_probs).sum(dim=1), **EXACT)
    tokens = torch.tensor([label for row in rows for label in row.labels[1:] if label != IGNORED])
    ceiling = -log_probs.gather(1, tokens[:, None]).mean()
    assert targets.loss == pytest.approx(float(ceiling), rel=1e-11)
    if not choices:
        assert float((weights - weights[0]).abs().max()) > 0.1, "the weights move along a row"


def test_it_keeps_the_likeliest_tokens_and_the_sum_of_the_others(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine = make_engine()
    teacher, rows = make_teacher(engine), make_rows(LENGTHS)
    whole = log_probs_of(teach(engine, teacher, rows, top_k=WHOLE, dtype=torch.float64)).exp()
    few = teach(engine, teacher, rows, top_k=5, dtype=torch.float64)
    values, ids = whole.topk(5, dim=1)
    assert torch.equal(few.ids_Nk.long(), ids)
    torch.testing.assert_close(few.log_probs_Nk.exp(), values, **EXACT)
    torch.testing.assert_close(few.tail_N, 1 - values.sum(dim=1), **EXACT)
    small = teach(engine, teacher, rows, top_k=5)
    assert (small.log_probs_Nk.dtype, small.ids_Nk.dtype) == (torch.float16, torch.int32)
    torch.testing.assert_close(small.log_probs_Nk.double(), few.log_probs_Nk, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_groups_of_teachers_change_nothing(
    at_once: int, make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine = make_engine()
    teacher, rows = make_teacher(engine, 4), make_rows(LENGTHS)
    together = teach(engine, teacher, rows, top_k=WHOLE, dtype=torch.float64)
    grouped = teach(engine, teacher, rows, top_k=WHOLE, teachers_at_once=at_once, dtype=torch.float64)
    assert_same(together, grouped)


def test_where_memory_runs_out_the_groups_get_smaller(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    teacher, rows = make_teacher(engine, 5), make_rows(LENGTHS)
    together = teach(engine, teacher, rows, top_k=WHOLE, dtype=torch.float64)
    read, sizes = engine.read, []

    def read_few(layout: Any, vectors: Sequence[torch.Tensor], rows: Any) -> torch.Tensor:
        sizes.append(len(vectors))
        if len(vectors) > 2:
            raise torch.OutOfMemoryError
        return read(layout, vectors, rows)

    monkeypatch.setattr(engine, "read", read_few)
    assert_same(together, teach(engine, teacher, rows, top_k=WHOLE, dtype=torch.float64))
    assert sizes == [5, 2, 2, 1]


@pytest.mark.parametrize(
    ("names", "value"), [(["STATE_BYTES"], 1), (["CHUNK"], 4), (["STATE_BYTES", "CHUNK"], 1)]
)
@pytest.mark.parametrize("hindsight", [False, True])
def test_how_many_rows_and_tokens_are_held_changes_nothing(
    names: list[str],
    value: int,
    hindsight: bool,
    make_engine: Callable,
    make_teacher: Callable,
    make_rows: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    teacher, rows = make_teacher(engine), make_rows(LENGTHS)

    def taught() -> Targets:
        return teach(engine, teacher, rows, top_k=WHOLE, hindsight=hindsight, dtype=torch.float64)

    whole = taught()
    for name in names:
        monkeypatch.setattr(module, name, value)
    assert_same(whole, taught())


def test_never_more_laws_than_a_chunk_exist(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    sizes = []
    mix = module.mix

    def measured(logits: torch.Tensor, *rest: Any) -> Any:
        sizes.append(logits.shape[:2].numel())
        return mix(logits, *rest)

    monkeypatch.setattr(module, "mix", measured)
    monkeypatch.setattr(module, "CHUNK", 16)
    teach(engine, make_teacher(engine), make_rows([40, 50]), top_k=4)
    assert max(sizes) == 15  # five tokens of three teachers


class Looks(TorchFunctionMode):
    """Counts what would wait for a device: values and tensors that are read back from it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("cpu", "tolist", "item", "__bool__", "__float__", "__int__", "nonzero")
        self.number += getattr(func, "__name__", "") in waits
        return func(*args, **(kwargs or {}))


def test_more_rows_and_chunks_are_no_more_looks_at_a_device(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("llama", "float32")
    width = engine.passes.head.weight_VD.shape[1]

    def read(layout: Any, vectors: Sequence[torch.Tensor], rows: Sequence[Encoded]) -> torch.Tensor:
        return torch.ones(len(vectors), sum(row.num_supervised for row in rows), width)

    monkeypatch.setattr(engine, "read", read)
    monkeypatch.setattr(module, "CHUNK", 16)
    teacher, looks = make_teacher(engine), []
    for lengths in ([8], [40, 50, 12]):
        with Looks() as counter:
            teach(engine, teacher, make_rows(lengths), top_k=4)
        looks.append(counter.number)
    assert looks[0] == looks[1] > 0


def test_order_and_neighbours_of_a_row_do_not_matter(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine = make_engine()
    teacher, rows = make_teacher(engine), make_rows(LENGTHS, context=0.3)
    whole = teach(engine, teacher, rows, top_k=WHOLE, dtype=torch.float64)
    turned = teach(engine, teacher, rows[::-1], top_k=WHOLE, dtype=torch.float64)
    for place, row in enumerate(rows):
        here, there = whole.places[row], turned.places[row]
        assert (here, there) == (place, len(rows) - 1 - place)
        parts = [
            log_probs_of(targets)[targets.starts[at] : targets.starts[at + 1]]
            for targets, at in ((whole, here), (turned, there))
        ]
        torch.testing.assert_close(*parts, **EXACT)


def test_context_is_no_evidence(make_engine: Callable, make_teacher: Callable, make_rows: Callable) -> None:
    engine = make_engine()
    teacher = make_teacher(engine)
    (row,) = make_rows([20])
    hidden = Encoded(row.tokens, (IGNORED,) * 10 + row.tokens[10:])
    seen, unseen = (teach(engine, teacher, [r], top_k=3, dtype=torch.float64) for r in (row, hidden))
    priors = torch.tensor([1, 2, 3], dtype=torch.float64) / 6
    torch.testing.assert_close(unseen.weights_NK[0], priors, rtol=0, atol=1e-12)
    assert float((seen.weights_NK[9] - priors).abs().max()) > 0.05
    assert len(unseen.tail_N) == 10


def test_equal_adapters_count_alike_and_say_what_one_says(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine(), make_rows(LENGTHS)
    (vector,) = make_teacher(engine, 1).adapters
    alone = teach(
        engine, Teacher((vector,), engine.layout, torch.ones(1)), rows, top_k=WHOLE, dtype=torch.float64
    )
    for kind in ("posterior", "uniform", "logit-mean"):
        teacher = Teacher((vector,) * 4, engine.layout, torch.ones(4), kind)
        targets = teach(engine, teacher, rows, top_k=WHOLE, dtype=torch.float64)
        torch.testing.assert_close(targets.weights_NK, torch.full_like(targets.weights_NK, 0.25), **EXACT)
        torch.testing.assert_close(log_probs_of(targets), log_probs_of(alone), **EXACT)


def poisoned(teacher: Teacher, place: int, vector: torch.Tensor) -> Teacher:
    adapters = list(teacher.adapters)
    adapters[place] = vector
    return replace(teacher, adapters=tuple(adapters))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 3e38])
@pytest.mark.parametrize("kind", ["posterior", "uniform", "logit-mean"])
def test_an_adapter_that_is_not_finite_is_silenced_and_named(
    kind: str, value: float, make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    """1e30 is finite, its products are not."""
    engine, rows = make_engine("llama", "float32"), make_rows(LENGTHS)
    sound = make_teacher(engine, 3, kind=kind)
    bad = torch.full_like(sound.adapters[0], value)
    targets = teach(engine, poisoned(sound, 1, bad), rows, top_k=5)
    assert targets.silenced == (1,)
    assert bool((targets.weights_NK[:, 1] == 0).all())
    others = replace(sound, adapters=(sound.adapters[0], sound.adapters[2]), priors=sound.priors[[0, 2]])
    expected = teach(engine, others, rows, top_k=5)
    torch.testing.assert_close(targets.weights_NK[:, [0, 2]], expected.weights_NK, rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.tail_N, expected.tail_N, rtol=0, atol=1e-5)
    assert targets.loss == pytest.approx(expected.loss, rel=1e-5)


def test_finite_garbage_loses_its_weight_on_text_of_others(
    make_engine: Callable, make_teacher: Callable
) -> None:
    engine = make_engine("llama", "float32")
    sound = make_teacher(engine, 3, scale=0.4)
    texts = sample_texts(
        engine,
        sound.adapters,
        sound.priors,
        [(7,), (9,)],
        number=12,
        max_tokens=24,
        seed=0,
    )
    rows = [Encoded(row.tokens, row.tokens) for row in texts.rows]
    noise = 30 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(9))
    teacher = poisoned(sound, 0, noise)
    targets = teach(engine, teacher, rows, top_k=8)
    honest = [n for n, writer in enumerate(texts.writers) if writer != 0 and rows[n].num_supervised > 12]
    assert len(honest) > 4
    last = torch.stack([targets.weights_NK[targets.starts[n + 1] - 1, 0] for n in honest])
    assert float(last.max()) < 1e-2
    uniform = teach(engine, replace(teacher, kind="uniform"), rows, top_k=8)
    assert targets.loss < uniform.loss


def test_no_finite_adapter_is_refused(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine, rows = make_engine("llama", "float32"), make_rows(LENGTHS)
    sound = make_teacher(engine, 2)
    for value, text in ((float("nan"), "no client's adapter is finite"), (1e30, "finite numbers on a row")):
        bad = torch.full_like(sound.adapters[0], value)
        with pytest.raises(NonFiniteError, match=text):
            teach(engine, replace(sound, adapters=(bad, bad)), rows, top_k=5)


def test_bytes_are_as_counted(make_engine: Callable, make_teacher: Callable, make_rows: Callable) -> None:
    engine = make_engine("llama", "float32")
    targets = teach(engine, make_teacher(engine, 4), make_rows(LENGTHS), top_k=7)
    assert len(targets.tail_N) == sum(LENGTHS) - len(LENGTHS)
    assert targets.num_bytes == target_bytes(len(targets.tail_N), 7, 4)
    assert targets.num_bytes == len(targets.tail_N) * (7 * 6 + 8 + 16)


def test_what_makes_no_teacher_is_refused(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    engine = make_engine("llama", "float32")
    sound = make_teacher(engine, 2)
    for change in (
        {"kind": "mean"},
        {"temper": -1.0},
        {"floor": 1.5},
        {"priors": torch.ones(3)},
        {"priors": torch.tensor([1.0, 0.0])},
    ):
        with pytest.raises(ConfigError):
            replace(sound, **change)
    with pytest.raises(LayoutError):
        replace(sound, adapters=())
    with pytest.raises(LayoutError):
        replace(sound, adapters=(sound.adapters[0], torch.zeros(3)))
    with pytest.raises(ConfigError, match="top-k"):
        teach(engine, sound, make_rows([4]), top_k=0)
    with pytest.raises(NoDataError):
        teach(engine, sound, [Encoded((5, 6), (IGNORED, IGNORED))], top_k=3)


def test_a_teacher_may_be_of_another_rank_than_the_engine(
    make_engine: Callable, make_teacher: Callable, make_rows: Callable
) -> None:
    from fedllm.adapters.layout import at_rank, with_rank

    engine, rows = make_engine(), make_rows(LENGTHS)
    narrow = make_teacher(engine)
    wide = at_rank(engine.layout, 5)
    vectors = tuple(with_rank(vector, engine.layout, 5) for vector in narrow.adapters)
    targets = [
        teach(engine, each, rows, top_k=WHOLE, dtype=torch.float64)
        for each in (narrow, replace(narrow, adapters=vectors, layout=wide))
    ]
    assert_same(*targets)
