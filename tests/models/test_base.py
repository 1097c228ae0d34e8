from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig

from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.errors import LayoutError, MissingExtraError, ModelError
from fedllm.models.base import (
    choose_device,
    choose_dtype,
    choose_model,
    describe_layout,
    load_base,
    target_modules,
)

CPU = torch.device("cpu")
LLAMA_LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_the_layout_read_from_files_is_that_of_the_loaded_model(
    kind: str, load_tiny: Callable, make_model_folder: Callable
) -> None:
    base = load_tiny(kind)
    layout = describe_layout(ModelConfig(name=str(make_model_folder(kind))), LoraConfig(rank=3))
    assert layout.fingerprint == base.fingerprint
    modules = dict(base.model.named_modules())
    hidden = torch.zeros(1, 1, 1)
    for matrix in layout.matrices:
        output = modules[matrix.module](hidden.new_zeros(2, matrix.in_features))
        assert output.shape == (2, matrix.out_features)


def test_all_linear_is_every_linear_layer_but_the_head(load_tiny: Callable) -> None:
    names = list(target_modules(load_tiny("llama").model, "all-linear"))
    assert [name.rpartition(".")[2] for name in names] == LLAMA_LEAVES * 2
    gpt2 = list(target_modules(load_tiny("gpt2").model, "all-linear"))
    assert [name.rpartition(".")[2] for name in gpt2] == ["c_attn", "c_proj", "c_fc", "c_proj"] * 2


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", 2),
        ("q_proj, v_proj,", 4),
        ("layers.1.mlp.up_proj", 1),
        ("model.layers.0.self_attn.q_proj,up_proj", 3),
    ],
)
def test_targets_match_the_end_of_a_modules_name(targets: str, expected: int, load_tiny: Callable) -> None:
    assert len(target_modules(load_tiny("llama").model, targets)) == expected


@pytest.mark.parametrize("targets", ["qproj", "proj", "q_proj,absent", "norm"])
def test_target_without_a_layer_is_refused_with_those_there_are(targets: str, load_tiny: Callable) -> None:
    with pytest.raises(ModelError, match=r"this model has down_proj, .*v_proj$"):
        target_modules(load_tiny("llama").model, targets)


def test_no_target_at_all_is_no_layout(make_model_folder: Callable) -> None:
    with pytest.raises(LayoutError, match=r"lora\.target-modules"):
        describe_layout(ModelConfig(name=str(make_model_folder())), LoraConfig(target_modules=" , "))


def test_layers_that_peft_cannot_read_are_named_once(model_copy: Path) -> None:
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 400}
    Glm4MoeConfig(**shape, **experts, num_attention_heads=4, num_key_value_heads=2).save_pretrained(
        model_copy
    )
    notices: list[str] = []
    layout = describe_layout(ModelConfig(name=str(model_copy)), LoraConfig(), notices.append)
    assert len(layout.matrices) == 8
    assert [line for line in notices if "down_proj, gate_proj, up_proj" in line] == notices != []
    describe_layout(ModelConfig(name=str(model_copy)), LoraConfig(target_modules="q_proj"), notices.append)
    assert len(notices) == 1


def test_base_model_is_frozen(make_model_folder: Callable) -> None:
    config = ModelConfig(name=str(make_model_folder()), dtype="float64", device="cpu")
    base = load_base(config)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float64}


def _missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage", [_missing_tensor, _truncated, _no_tokenizer])
def test_a_model_that_lacks_a_part_is_refused_in_one_line(
    damage: Callable[[Path], None], model_copy: Path
) -> None:
    damage(model_copy)
    with pytest.raises(ModelError, match="copy") as caught:
        load_base(ModelConfig(name=str(model_copy)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"model_type": "zork"}, {"hidden_size": 64}], ids=["unknown architecture", "other sizes"]
)
def test_model_unlike_its_config_is_refused_in_one_line(
    values: dict, model_copy: Path, edit_json: Callable
) -> None:
    edit_json(model_copy / "config.json", **values)
    with pytest.raises(ModelError, match="cannot load copy") as caught:
        load_base(ModelConfig(name=str(model_copy)))
    assert "\n" not in str(caught.value)


def test_devices_and_dtypes_are_chosen_by_name() -> None:
    assert choose_device("cpu") == CPU
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float64", CPU) == torch.float64
    for name in ("gpu7", "mps", "meta"):
        with pytest.raises(ModelError, match="expected auto, cpu or cuda"):
            choose_device(name)
    with pytest.raises(ModelError, match=r"CUDA devices here, counted from 0; use auto or cpu"):
        choose_device(f"cuda:{torch.cuda.device_count()}")


def test_quantization_without_gpu_or_package_is_refused(make_model_folder: Callable) -> None:
    config = ModelConfig(name=str(make_model_folder()), device="cpu", quantization="4bit")
    for load in (load_base, choose_model):
        with pytest.raises((ModelError, MissingExtraError), match=r"model\.quantization"):
            load(config)
