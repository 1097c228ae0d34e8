"""A GGUF file: read by transformers and by gguf's own reader it is the model that was written."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from fedllm.adapters.layout import AdapterState
from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.errors import LayoutError, ModelError
from fedllm.models.base import BaseModel, layout_of, load_base
from fedllm.models.files import resolve_model
from fedllm.models.gguf_file import check_has_form, write_gguf
from fedllm.models.merged import merged_model

TEXT = "Open the file, and sort 12 lists.<|end|> Return é!"


def make(folder: Path, tokenizer: Path, config: transformers.PretrainedConfig) -> BaseModel:
    """Save a random model, large enough in its weights that a row in the wrong place changes what it says."""
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += (0.1 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return load_base(ModelConfig(name=str(folder), dtype="float32"))


@pytest.fixture
def kinds(make_model_folder: Callable[..., Path]) -> Callable[..., transformers.PretrainedConfig]:
    """Return a function (kind, changes) -> the configuration of a small model of a kind."""
    size = len(transformers.AutoTokenizer.from_pretrained(make_model_folder()))
    shape = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": size + 7}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}

    def of(kind: str, **changes: object) -> transformers.PretrainedConfig:
        kinds = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
        width = {"head_dim": 128} if kind == "qwen3" else {}  # the only one that transformers reads
        return getattr(transformers, kinds[kind])(**shape, **heads, **width, **changes)

    return of


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_transformers_reads_the_model_that_was_written(
    kind: str, tied: bool, kinds: Callable, make_model_folder: Callable, tmp_path: Path
) -> None:
    base = make(tmp_path / "model", make_model_folder(), kinds(kind, tie_word_embeddings=tied))
    tokens = base.tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        own = base.model(torch.tensor([tokens])).logits
    for form, most in (("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.1), ("q8_0", 0.1)):
        write_gguf(tmp_path / f"{form}.gguf", base, "a test", form)
        where = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": f"{form}.gguf"}
        read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        with torch.no_grad():
            assert (read(torch.tensor([tokens])).logits - own).norm() < most * own.norm(), form
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    assert tokenizer(TEXT)["input_ids"] == tokens
    assert tokenizer.chat_template == base.tokenizer.chat_template
    assert tokenizer.eos_token_id == base.tokenizer.eos_token_id


def test_the_readers_of_the_format_find_what_they_need(make_model_folder: Callable, tmp_path: Path) -> None:
    base = load_base(ModelConfig(name=str(make_model_folder()), dtype="float32"))
    write_gguf(tmp_path / "a.gguf", base, "a test", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL  # <|end|>
    assert len(values["tokenizer.ggml.tokens"]) == base.model.config.vocab_size
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert "output.weight" not in types  # tied to the embeddings
    assert types["token_embd.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"
    assert types["blk.1.ffn_down.weight"] == "F16"  # rows of 48 part into no blocks of 32


def test_what_has_no_form_is_refused_with_a_cure(
    kinds: Callable, make_model_folder: Callable, load_tiny: Callable, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"type gpt2 .*--merge"):
        write_gguf(tmp_path / "a.gguf", load_tiny("gpt2"), "a test", "float32")
    scaled = kinds("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ModelError, match=r"linear scaling.*--merge"):
        check_has_form(scaled)
    windows = kinds("qwen2", layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    with pytest.raises(ModelError, match=r"windows.*--merge"):
        check_has_form(windows)
    folder = tmp_path / "model"
    base = make(folder, make_model_folder(), kinds("llama"))
    from tokenizers import pre_tokenizers

    base.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match=r"tokenizer of model.*--merge"):
        write_gguf(tmp_path / "a.gguf", base, "a test", "float32")
    assert not (tmp_path / "a.gguf").exists()


def test_a_merged_model_is_rounded_once(make_model_folder: Callable) -> None:
    files = resolve_model(str(make_model_folder()))
    base = load_base(ModelConfig(name=str(files.folder), dtype="float64"))
    layout = layout_of(base.model, LoraConfig(rank=3, alpha=5.0), base.fingerprint)
    adapter = AdapterState(layout, torch.randn(layout.size, generator=torch.Generator().manual_seed(1)))
    exact = {
        matrix.module: base.model.get_submodule(matrix.module).weight + layout.scale * b.double() @ a.double()
        for matrix, (a, b) in zip(layout.matrices, layout.factors(adapter.vector), strict=True)
    }
    with merged_model(files, adapter, torch.bfloat16) as whole:
        for name, weight in exact.items():
            wrong = (whole.model.get_submodule(name).weight.double() - weight).abs()
            assert bool((wrong <= weight.abs() * 2**-8 * 1.001 + 1e-6).all()), name


def test_an_adapter_of_another_model_is_not_merged(make_model_folder: Callable) -> None:
    base = load_base(ModelConfig(name=str(make_model_folder("llama", 1)), dtype="float32"))
    layout = layout_of(base.model, LoraConfig(rank=1), base.fingerprint)
    other = resolve_model(str(make_model_folder("llama", 0)))
    with (
        pytest.raises(LayoutError, match="not the one on this machine"),
        merged_model(other, AdapterState(layout, torch.zeros(layout.size))),
    ):
        pass
