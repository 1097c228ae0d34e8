"""PEFT adapts the layers that were trained, and reads the tensors that were trained for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedllm.adapters.folder import load_named, save_adapter, save_named
from fedllm.adapters.layout import AdapterState
from fedllm.adapters.peft_reading import (
    check_peft_reads,
    modules_peft_adapts,
    names_for_peft,
    peft_config,
    tensors_peft_reads,
)
from fedllm.config.keys import LoraConfig
from fedllm.errors import IntegrityError, ModelError
from fedllm.models.base import layout_of, target_modules

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}


def skeleton(kind: str) -> Any:
    groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SMALL, **HEADS),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            **SMALL, **LATENT, **EXPERTS, **groups, num_attention_heads=4, num_key_value_heads=4
        ),
        "glm4_moe": lambda: transformers.Glm4MoeConfig(**SMALL, **HEADS, **EXPERTS, **groups),
        "falcon_h1": lambda: transformers.FalconH1Config(**SMALL, **HEADS, **MAMBA),
        "mamba2": lambda: transformers.Mamba2Config(
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=64,
            num_heads=8,
            head_dim=8,
            state_size=8,
            n_groups=1,
        ),
    }
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(configs[kind]())


def kinds_of(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def random_adapter(model: Any, targets: str = "all-linear") -> AdapterState:
    layout = layout_of(model, LoraConfig(rank=2, alpha=4.0, target_modules=targets), "f" * 64)
    return AdapterState(layout, torch.randn(layout.size, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def published(tmp_path: Path) -> Callable[[Any, AdapterState], Path]:
    def save(model: Any, state: AdapterState) -> Path:
        names = names_for_peft(model, [matrix.module for matrix in state.layout.matrices])
        assert names is not None
        save_adapter(tmp_path / "a", state, base_model="m", revision="", target_modules=names, card="")
        return tmp_path / "a"

    return save


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("llama", set()),
        ("deepseek_v3", {"gate_proj", "up_proj", "down_proj"}),  # PEFT takes these for fused experts
        ("glm4_moe", {"gate_proj", "up_proj", "down_proj"}),
        ("falcon_h1", {"out_proj"}),  # PEFT refuses these
        ("mamba2", {"out_proj"}),
    ],
)
def test_all_linear_is_what_peft_reads_as_it_was_trained(
    kind: str, left_out: set[str], published: Callable
) -> None:
    model = skeleton(kind)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    adapted = set(target_modules(model, "all-linear"))
    assert kinds_of(linear - adapted) == left_out
    state = random_adapter(model)
    read = tensors_peft_reads(published(model, state), model)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in state.tensors().items()
    }


@pytest.mark.parametrize(("kind", "targets"), [("deepseek_v3", "q_b_proj,up_proj"), ("mamba2", "out_proj")])
def test_named_layers_that_peft_cannot_read_are_refused(kind: str, targets: str) -> None:
    with pytest.raises(ModelError, match=r"lora\.target-modules: .*(up|out)_proj.* " + kind) as caught:
        target_modules(skeleton(kind), targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("targets", ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj,v_proj"])
def test_single_layers_are_read_as_single_layers(targets: str, published: Callable) -> None:
    model = skeleton("llama")
    state = random_adapter(model, targets)
    names = names_for_peft(model, [matrix.module for matrix in state.layout.matrices])
    assert names is not None
    adapted = modules_peft_adapts(model, peft_config(2, 4.0, names))
    assert adapted == set(target_modules(model, targets))
    check_peft_reads(published(model, state), model, state)


def test_an_adapter_that_peft_reads_otherwise_is_refused(published: Callable) -> None:
    model = skeleton("llama")
    state = random_adapter(model, "q_proj")
    folder = published(model, state)
    name, tensor = next(iter(state.tensors().items()))
    tensor[0, 0] = -0.0
    with pytest.raises(IntegrityError, match="other numbers"):
        check_peft_reads(folder, model, state)
    weights = folder / "adapter_model.safetensors"
    tensors = load_named(weights)
    tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"] = tensors.pop(name)
    save_named(weights, tensors)
    with pytest.raises(IntegrityError, match=r"q_proj\.lora_A"):
        check_peft_reads(folder, model, state)
