"""What is found out about a model before it trains: causality, rows that reach their neighbours."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedllm.adapters.layout import initial_adapter
from fedllm.attacks.token_scores import no_adapter, score, whole
from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import ModelError
from fedllm.models.base import BaseModel, describe_layout, layout_of
from tests.models.families import tiny_model


@pytest.fixture
def own_base(load_tiny: Callable) -> BaseModel:
    """A Llama that a test may spoil, with the tokenizer of the shared one."""
    shared = load_tiny("llama")
    model = type(shared.model)(shared.model.config).requires_grad_(False).eval()
    return replace(shared, model=model, sums={})


def engine_of(base: BaseModel, budget: int = 512) -> Engine:
    return Engine(base, layout_of(base.model, LoraConfig(rank=2), base.fingerprint), token_budget=budget)


def spoil(base: BaseModel, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change what the first layer gives, [1, T, D]."""
    base.model.model.layers[0].register_forward_hook(lambda _layer, _inputs, output: change(output))


def with_neighbour(x: torch.Tensor) -> torch.Tensor:
    """Add a little of the token before to each token, as a convolution does."""
    return x + 1e-3 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def with_loudest(x: torch.Tensor) -> torch.Tensor:
    """Add a little of the largest value of the whole pass, as rounding to its scale does."""
    return x + 1e-3 * x.amax(dim=(0, 1), keepdim=True)


@pytest.mark.parametrize("leak", [with_neighbour, with_loudest])
def test_leak_far_below_rounding_of_losses_is_found(
    leak: Callable, own_base: BaseModel, make_rows: Callable
) -> None:
    assert engine_of(own_base).is_ragged
    if leak is with_loudest:  # over all tokens this one looks ahead too
        monitored = leak
        leak = lambda x: monitored(x) if x.shape[1] > 8 else x  # noqa: E731
    spoil(own_base, leak)
    engine = engine_of(own_base)
    assert not engine.is_ragged
    jobs = [
        EvaluationJob(str(place), no_adapter(engine), (row,)) for place, row in enumerate(make_rows([6, 7]))
    ]
    together = [each.loss for each in engine.evaluate(jobs)]
    assert together == [engine.evaluate([job])[0].loss for job in jobs]


def private_job(make_job: Callable, engine: Engine) -> Any:
    return replace(make_job(engine.layout, steps=1), example_clip=1.0)


def test_private_examples_that_mix_under_adapters_go_alone(own_base: BaseModel, make_job: Callable) -> None:
    engine = engine_of(own_base)
    spoil(own_base, with_neighbour)  # after the engine has tried the bare model
    job = private_job(make_job, engine)
    (result,) = engine.train([job])
    assert not engine.is_ragged
    alone = engine_of(own_base, budget=1)
    assert torch.equal(result.delta, next(iter(alone.train([job]))).delta)


def test_model_that_mixes_examples_even_alone_trains_none(own_base: BaseModel, make_job: Callable) -> None:
    engine, seen = engine_of(own_base), []

    def remember(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.mean().detach())
        return x + sum(seen)

    spoil(own_base, remember)
    with pytest.raises(ModelError, match="mixes"):
        list(engine.train([private_job(make_job, engine)]))


@pytest.mark.parametrize("family", ["bert", "xlm"])
def test_model_that_sees_later_tokens_gets_no_engine(family: str, own_base: BaseModel) -> None:
    with pytest.raises(ModelError, match="not causal") as caught:
        engine_of(replace(own_base, model=tiny_model(family)))
    assert "model.name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_states_of_another_dtype_than_the_head_are_read(own_base: BaseModel) -> None:
    half = tiny_model("mamba").to(torch.bfloat16)  # adds up in float32
    engine = engine_of(replace(own_base, model=half, dtype=torch.bfloat16))
    rows = [whole(range(5, 15))]
    found = engine.evaluate([EvaluationJob("a", no_adapter(engine), tuple(rows))])[0].loss
    tokens = torch.tensor([rows[0].tokens])
    expected = cross_entropy(half(input_ids=tokens).logits[0, :-1].float(), tokens[0, 1:])
    assert found == pytest.approx(float(expected), rel=1e-2)


def test_layer_that_sees_some_tokens_alone_is_refused(own_base: BaseModel, make_rows: Callable) -> None:
    engine, norm = engine_of(own_base), own_base.model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda _layer, _inputs, output: output[:, ::2])  # as a mixture's router does
    job = EvaluationJob("a", no_adapter(engine), make_rows([6]))
    with pytest.raises(ModelError, match="target-modules"):
        engine.evaluate([job])


def test_bert_is_refused_before_its_weights_are_read(tmp_path: Path, make_model_folder: Callable) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    for file in make_model_folder("llama").glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="not causal"):
        describe_layout(ModelConfig(name=str(tmp_path)), LoraConfig())


def test_long_row_stretches_no_rotation_of_its_neighbours(own_base: BaseModel) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    stretched = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        max_position_embeddings=128,
        eos_token_id=0,
        original_max_position_embeddings=32,
        rope_parameters=stretched,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.data.mul_(5.0 if weight.dim() > 1 else 1.0)
    engine = engine_of(replace(own_base, model=model))
    assert engine.is_ragged
    vector = initial_adapter(engine.layout, 0).vector
    rows = [whole(range(5, 15)), whole(range(20, 60))]
    (together,) = score(engine, [vector], rows)
    ((alone,),) = score(engine, [vector], rows[:1])
    torch.testing.assert_close(together[0].log_probs, alone.log_probs, rtol=1e-6, atol=1e-6)
