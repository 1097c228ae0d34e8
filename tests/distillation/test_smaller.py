"""A student cut out of a model is that model without some layers, and it can be taught."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers

from fedllm.adapters.layout import initial_adapter
from fedllm.config.keys import LoraConfig
from fedllm.distillation.smaller import (
    cut,
    decoder_layers,
    distil_layers,
    layer_angles,
    layers_to_keep,
)
from fedllm.distillation.student import StudentTraining, distil
from fedllm.distillation.targets import Targets
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.errors import ConfigError, ModelError
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import Encoded

LENGTHS = [12, 20, 7, 16]
LORA = LoraConfig(rank=2, alpha=6.0)
TRAINING = StudentTraining(steps=30, batch_size=4, learning_rate=1e-2, seed=0)


@pytest.fixture(scope="module")
def deep(load_tiny: Callable) -> BaseModel:
    """A Llama of seven layers."""
    tiny = load_tiny("llama", "float32")
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**tiny.model.config.to_dict(), "num_hidden_layers": 7})
    ).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return replace(tiny, model=model.requires_grad_(False), fingerprint="7" * 64)


def targets_of(base: BaseModel, rows: tuple[Encoded, ...]) -> Targets:
    engine = Engine(base, layout_of(base.model, LORA, base.fingerprint), token_budget=512)
    vector = initial_adapter(engine.layout, 0).vector  # B = 0: the model itself
    return teach(engine, Teacher((vector,), engine.layout, torch.ones(1)), rows, top_k=32)


def test_angles_are_those_between_the_hidden_states(deep: BaseModel, make_rows: Callable) -> None:
    rows = make_rows(LENGTHS)
    angles = layer_angles(deep, rows)
    states = []
    model = deepcopy(deep.model)
    model.model.norm = torch.nn.Identity()
    for row in rows:
        hidden = model(input_ids=torch.tensor([row.tokens]), output_hidden_states=True).hidden_states
        states.append(torch.stack([state[0].double() for state in hidden]))
    together = torch.cat(states, dim=1)
    lengths = together.norm(dim=2)
    cosines = (together[:-1] * together[1:]).sum(dim=2) / (lengths[:-1] * lengths[1:])
    expected = cosines.clamp(-1, 1).arccos().mean(dim=1) / torch.pi
    torch.testing.assert_close(torch.tensor(angles, dtype=torch.float64), expected, rtol=0, atol=1e-6)
    assert not any(layer._forward_hooks for layer in decoder_layers(deep.model))


def test_the_least_turning_layers_go_but_not_the_first_or_last() -> None:
    angles = (0.0, 0.3, 0.1, 0.4, 0.2, 0.0, 0.0)
    assert layers_to_keep(angles, 0) == tuple(range(7))
    assert layers_to_keep(angles, 2) == (0, 1, 3, 5, 6)
    assert layers_to_keep(angles, 4) == (0, 5, 6)
    for number in (5, -1):
        with pytest.raises(ConfigError, match="at most 4"):
            layers_to_keep(angles, number)


@pytest.mark.parametrize("kept", [tuple(range(7)), (0, 2, 5, 6)])
def test_a_student_is_the_model_without_the_layers(deep: BaseModel, kept: tuple[int, ...]) -> None:
    student = cut(deep, kept)
    tokens = torch.arange(5, 25)[None]
    expected = deepcopy(deep.model)
    expected.model.layers = torch.nn.ModuleList(expected.model.layers[place] for place in kept)
    torch.testing.assert_close(
        student.model(input_ids=tokens, use_cache=False).logits,
        expected(input_ids=tokens, use_cache=False).logits,
        rtol=0,
        atol=0,
    )
    assert student.model.config.num_hidden_layers == len(kept)
    assert [layer.self_attn.layer_idx for layer in decoder_layers(student.model)] == list(range(len(kept)))
    assert student.fingerprint != deep.fingerprint
    theirs = {parameter.data_ptr() for parameter in deep.model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in student.model.parameters()}


def test_layers_of_two_kinds_keep_their_kind(load_tiny: Callable) -> None:
    student = cut(load_tiny("gemma3", "float32"), (1,))
    assert student.model.config.layer_types == ["full_attention"]
    assert student.model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_student_keeps_on_disk_what_it_is(deep: BaseModel, tmp_path: object) -> None:
    student = cut(deep, (0, 5, 6))
    student.model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(again(tokens).logits, student.model(tokens).logits)


def test_the_large_models_targets_teach_the_student_an_adapter(deep: BaseModel, make_rows: Callable) -> None:
    targets = targets_of(deep, make_rows(LENGTHS))
    student = cut(deep, (0, 2, 5, 6))
    engine = Engine(student, layout_of(student.model, LORA, student.fingerprint), token_budget=512)
    result = distil(engine, initial_adapter(engine.layout, 0), targets, TRAINING)
    assert result.losses[-1] < 0.5 * result.losses[0]


def test_they_teach_it_its_own_layers_and_leave_the_rest(deep: BaseModel, make_rows: Callable) -> None:
    targets = targets_of(deep, make_rows(LENGTHS))
    student = cut(deep, (0, 2, 5, 6))
    embeddings = student.model.get_input_embeddings().weight.clone()
    large = {name: tensor.clone() for name, tensor in deep.model.state_dict().items()}
    losses = distil_layers(student, targets, replace(TRAINING, learning_rate=3e-3))
    assert len(losses) == 30
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(student.model.get_input_embeddings().weight, embeddings)
    assert all(torch.equal(tensor, large[name]) for name, tensor in deep.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in student.model.parameters())


def test_the_whole_model_as_student_has_nothing_to_learn(deep: BaseModel, make_rows: Callable) -> None:
    targets = targets_of(deep, make_rows(LENGTHS))
    student = cut(deep, range(7))
    losses = distil_layers(student, targets, replace(TRAINING, steps=3))
    assert max(losses) < 1e-5
    for name, tensor in deep.model.state_dict().items():
        assert torch.equal(tensor, student.model.state_dict()[name])


def test_a_model_of_another_build_is_refused(load_tiny: Callable) -> None:
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot be cut"):
        cut(load_tiny("gpt2", "float32"), (0,))
