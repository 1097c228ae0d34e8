"""The engine's own forward pass of a decoder against transformers' forward: states, losses, gradients."""

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedllm.adapters.base_delta import BaseDelta
from fedllm.config.keys import LoraConfig
from fedllm.engine.decoder import Decoder
from fedllm.engine.decoder_probe import computes_the_same, read_decoder
from fedllm.engine.engine import Engine
from fedllm.engine.flat_row import predicting_states
from fedllm.engine.jobs import EvaluationJob
from fedllm.engine.passes import Item, Passes
from fedllm.engine.pointwise import PlainPointwise
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import Encoded
from fedllm.models.with_base_delta import with_base_delta
from tests.engine.test_recorded import Recorder, recorded_by, some_jobs
from tests.models.families import SHAPE, tiny_model

OWN = ["llama", "llama, own head", "mistral", "qwen2", "qwen3"]
OWNERS = (0, 0, 0, 1, 2, 2)  # of the rows of a pass
# transformers norms in float32 whatever the model's dtype, so sums are rounded at 2^-24 of their values.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def base_of(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> BaseModel:
    torch.manual_seed(seed)
    model = tiny_model(family).to(dtype).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # transformers starts them as zeros and ones
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return BaseModel(model, None, None, family, torch.device("cpu"), dtype)  # type: ignore[arg-type]


def engine_of(base: BaseModel, targets: str = "all-linear") -> Engine:
    lora = LoraConfig(rank=2, alpha=6.0, target_modules=targets)
    return Engine(base, layout_of(base.model, lora, base.fingerprint), token_budget=512)


def own_passes(engine: Engine) -> Passes:
    """Return the engine's passes through the own decoder."""
    decoder = read_decoder(engine.base.model, engine.bank, PlainPointwise())
    assert decoder is not None
    return replace(engine.passes, trunk=decoder)


def items(make_rows: Callable, dropout: float = 0.0) -> list[Item]:
    """Return rows of three clients, two rows of the first beginning alike."""
    rows = list(make_rows([20, 19, 25, 3, 8, 11]))
    rows = [Encoded(tuple(token % 96 for token in row.tokens), row.labels) for row in rows]
    rows = [Encoded(row.tokens, (-100, *row.tokens[1:])) for row in rows]
    for place in (1, 2):
        tokens = rows[0].tokens[:12] + rows[place].tokens[12:]
        rows[place] = Encoded(tokens, (-100, *tokens[1:]))
    pairs = enumerate(zip(rows, OWNERS, strict=True))
    return [
        Item(row, owner, owner, 0.1, dropout, seed=place if dropout else 0) for place, (row, owner) in pairs
    ]


def computed(engine: Engine, passes: Passes, given: list[Item], trained: str) -> tuple[torch.Tensor, ...]:
    """Return losses, gradients and states of one pass under random adapters."""
    starts = [torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    engine.bank.load(engine.layout, [0.1 * start for start in starts], [3.0, 1.0, 2.0], trained)
    with passes.attached():
        engine.bank.reserve(3)
        losses = passes.losses(given, backward=True)
        grads = engine.bank.grad_SP.clone()
        with torch.inference_mode():
            return losses, grads, passes.states(given).clone()


def check_same(engine: Engine, given: list[Item], trained: str = "both") -> None:
    expected = computed(engine, engine.passes, given, trained)
    assert float(expected[1].norm()) > 1e-3
    torch.testing.assert_close(computed(engine, own_passes(engine), given, trained), expected, **CLOSE)


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,up_proj"])
def test_own_decoder_equals_transformers(family: str, targets: str, make_rows: Callable) -> None:
    check_same(engine_of(base_of(family), targets), items(make_rows))


@pytest.mark.parametrize("trained", ["a", "b"])
def test_one_factor_trains_alone_in_the_own_decoder(trained: str, make_rows: Callable) -> None:
    check_same(engine_of(base_of("llama")), items(make_rows), trained)


def test_own_decoder_drops_what_transformers_path_drops(make_rows: Callable) -> None:
    check_same(engine_of(base_of("qwen2")), items(make_rows, dropout=0.3))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_own_decoder_recomputes_checkpointed_layers(make_rows: Callable) -> None:
    base = base_of("llama")
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    base.model.model.layers.train()
    engine, calls = engine_of(base), []
    check_same(engine, items(make_rows))
    decoder: Any = own_passes(engine).trunk

    class Counted(PlainPointwise):
        def gate(self, both_TF: torch.Tensor) -> torch.Tensor:
            calls.append(len(both_TF))
            return super().gate(both_TF)

    computed(
        engine, replace(engine.passes, trunk=replace(decoder, pointwise=Counted())), items(make_rows), "both"
    )
    assert len(calls) == 3 * len(decoder.layers)  # forward, again in the backward pass, and for the states


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_own_decoder_sees_a_base_delta(some: bool, make_rows: Callable) -> None:
    engine = engine_of(base_of("qwen2"))
    draw = torch.Generator().manual_seed(5)
    factors = []
    for place, matrix in enumerate(engine.layout.matrices):
        rank = 0 if some and place % 2 else 1
        b_ON = 0.1 * torch.randn(matrix.out_features, rank, generator=draw)
        factors.append((b_ON, torch.randn(rank, matrix.in_features, generator=draw)))
    own, given = own_passes(engine), items(make_rows)
    without = computed(engine, own, given, "both")
    with with_base_delta(engine.base, BaseDelta(engine.layout, tuple(factors))):
        check_same(engine, given)
        assert not torch.allclose(computed(engine, own, given, "both")[0], without[0])
    torch.testing.assert_close(computed(engine, own, given, "both"), without, **CLOSE)


@pytest.mark.parametrize("family", ["gemma", "gpt2", "granite", "helium", "mixtral", "olmo2", "phi3"])
def test_other_decoders_keep_transformers_forward(family: str) -> None:
    assert not isinstance(engine_of(base_of(family, torch.bfloat16)).passes.trunk, Decoder)


NEARLY: dict[str, tuple[str, dict[str, Any]]] = {
    "some layers do not rotate": ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "layers count 0.9": ("granite", {"logits_scaling": 1.0, "residual_multiplier": 0.9}),
    "embeddings count 1.1": ("granite", {"logits_scaling": 1.0, "embedding_multiplier": 1.1}),
    "other pairs are rotated": ("helium", {"head_dim": 8}),
    "far queries are scaled": ("ministral3", {"head_dim": 8}),
}


@pytest.mark.parametrize("case", NEARLY)
def test_nearly_a_decoder_keeps_transformers_forward(case: str) -> None:
    family, settings = NEARLY[case]
    config = AutoConfig.for_model(family, **(SHAPE | settings))
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).requires_grad_(False).eval()
    base = BaseModel(model, None, None, family, torch.device("cpu"), torch.bfloat16)  # type: ignore[arg-type]
    assert not isinstance(engine_of(base).passes.trunk, Decoder)


def test_probe_draws_nothing_and_keeps_no_model() -> None:
    base = base_of("llama", torch.bfloat16)
    state = torch.get_rng_state()
    engine: Any = engine_of(base)
    assert isinstance(engine.passes.trunk, Decoder)
    assert torch.equal(torch.get_rng_state(), state)
    layer = weakref.ref(base.model.model.layers[0].self_attn)
    del base, engine
    gc.collect()
    assert layer() is None


def test_half_precision_takes_the_own_decoder_alone() -> None:
    assert isinstance(engine_of(base_of("llama", torch.bfloat16)).passes.trunk, Decoder)
    assert not isinstance(engine_of(base_of("llama", torch.float32)).passes.trunk, Decoder)


def test_a_decoder_whose_kernels_fail_is_left_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise LookupError("out of resource\nand more")  # no RuntimeError, as those of Triton

    monkeypatch.setattr(PlainPointwise, "gate", refuse)
    assert not isinstance(engine_of(base_of("llama", torch.bfloat16)).passes.trunk, Decoder)
    (line,) = [message for message in caplog.messages if "own forward pass" in message]
    assert "out of resource" in line
    assert "\n" not in line


@pytest.mark.parametrize("change", ["window", "scale"])
def test_a_decoder_that_computes_otherwise_is_found_out(change: str) -> None:
    engine = engine_of(base_of("mistral", torch.float32))
    own = own_passes(engine)
    decoder: Any = own.trunk
    assert computes_the_same(engine.passes, own)
    other = {"window": 3} if change == "window" else {"scale": 1.0}
    layers = (replace(decoder.layers[0], **other), *decoder.layers[1:])
    assert not computes_the_same(engine.passes, replace(own, trunk=replace(decoder, layers=layers)))


def test_bfloat16_rounds_no_worse_than_transformers(make_rows: Callable) -> None:
    engine = engine_of(base_of("qwen3", torch.bfloat16))
    exact_model = deepcopy(engine.base.model).double()
    exact = engine_of(replace(engine.base, model=exact_model, dtype=torch.float64))
    truth = computed(exact, exact.passes, items(make_rows), "both")[1]
    own, theirs = (
        float((computed(engine, passes, items(make_rows), "both")[1] - truth).norm() / truth.norm())
        for passes in (own_passes(engine), replace(engine.passes, trunk=transformers_forward(engine)))
    )
    assert own <= 1.2 * theirs <= 0.1


def transformers_forward(engine: Engine) -> Any:
    """Return the twin, where the engine has taken the own decoder."""
    return partial(predicting_states, engine.base.model, head=engine.passes.head)


def test_evaluation_and_reading_go_through_the_trunk(make_rows: Callable) -> None:
    engine = engine_of(base_of("llama", torch.float32))
    rows = tuple(item.row for item in items(make_rows))
    start = 0.1 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(0))
    expected = (
        engine.evaluate([EvaluationJob("a", start, rows)])[0].loss,
        engine.read(engine.layout, [start], rows),
    )
    engine.passes = own_passes(engine)
    torch.testing.assert_close(
        engine.evaluate([EvaluationJob("a", start, rows)])[0].loss, expected[0], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(engine.read(engine.layout, [start], rows), expected[1], rtol=1e-5, atol=1e-5)


def test_own_decoder_trains_in_recorded_passes(
    make_engine: Callable, make_job: Callable, make_rows: Callable
) -> None:
    plain, recorder = make_engine("llama"), Recorder()
    engine = recorded_by(make_engine("llama"), recorder)
    engine.passes = replace(own_passes(engine), shelf=engine.passes.shelf)
    jobs = some_jobs(plain, make_job, make_rows)
    for found, expected in zip(engine.train(jobs), plain.train(jobs), strict=True):
        torch.testing.assert_close(found.delta, expected.delta, rtol=0, atol=1e-4)
    assert recorder.replayed > recorder.recorded > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OWN)
def test_own_decoder_is_taken_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    base = base_of(family, dtype)
    base.model.to("cuda")
    engine = engine_of(replace(base, device=torch.device("cuda")))
    assert isinstance(engine.passes.trunk, Decoder)
    assert computes_the_same(replace(engine.passes, trunk=transformers_forward(engine)), engine.passes)
