"""A model as one GGUF file, the form that llama.cpp, Ollama and LM Studio run.

The names of keys and tensors, and the order of rows, are those of llama.cpp's convert_hf_to_gguf.py. The
architectures here differ from transformers in nothing else.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fedllm.errors import ModelError
from fedllm.models.base import BaseModel

_ARCHITECTURES = {  # by transformers' type of model
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
TYPES = tuple(_TYPES)
# llama.cpp knows a tokenizer's way to part text by a name, these regular expressions among them.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
_CURE = "export it with --merge and convert that folder with llama.cpp's convert_hf_to_gguf.py"


def write_gguf(file: Path, base: BaseModel, name: str, kind: str) -> None:
    """Write a model with its tokenizer and chat template; `kind` of `TYPES` holds all but the norms.

    Rows that do not part into blocks of 32 are float16 in a file of "q8_0".

    Raises:
        ModelError: the architecture or the tokenizer has no form here.
    """
    check_has_form(base.model.config)
    splitting = _splitting(base)
    architecture, (tensor_type, file_type) = _ARCHITECTURES[base.model.config.model_type], _TYPES[kind]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, base.model.config)
    _add_vocabulary(writer, base, splitting)
    for tensor_name, values in _tensors(base.model, architecture):
        used = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else tensor_type
        if used == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
            used = gguf.GGMLQuantizationType.F16
        writer.add_tensor(tensor_name, gguf.quantize(values, used), raw_dtype=used)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def check_has_form(config: Any) -> None:
    """Refuse a model (by its transformers.PretrainedConfig) that `write_gguf` cannot write.

    Raises:
        ModelError: it is of another architecture, or computes something that a file of it would not say.
    """
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise ModelError(f"no GGUF file of a model of type {kind} ({', '.join(_ARCHITECTURES)}); {_CURE}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise ModelError(f"no GGUF file of a model with {rope} scaling of positions; {_CURE}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError(f"no GGUF file of a model with sliding windows; {_CURE}")


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _splitting(base: BaseModel) -> str:
    """Return llama.cpp's name for how a byte-level BPE tokenizer parts text before it merges.

    Raises:
        ModelError: it has none here, or the tokenizer is of another kind.
    """
    described = json.loads(base.tokenizer.backend_tokenizer.to_str())
    first = described["pre_tokenizer"] or {}
    *parts, last = first.get("pretokenizers") or [first]
    is_byte_level = described["model"]["type"] == "BPE" and last.get("type") == "ByteLevel"
    name = None
    if is_byte_level and not last["add_prefix_space"]:
        if not last["use_regex"]:
            name = _SPLITS.get(parts[0].get("pattern", {}).get("Regex", "")) if len(parts) == 1 else None
        elif not parts:
            name = "gpt-2"
        elif parts == [{"type": "Digits", "individual_digits": True}]:
            name = "smollm"
    if name is None:
        raise ModelError(f"no GGUF file with the tokenizer of {base.files.public_name}; {_CURE}")
    return name


def _add_vocabulary(writer: gguf.GGUFWriter, base: BaseModel, splitting: str) -> None:
    tokenizer, size = base.tokenizer, base.model.config.vocab_size
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        tokens.append(known.get(number, f"[PAD{number}]"))  # embeddings without a token
        if number not in known:
            types.append(gguf.TokenType.UNUSED)
        elif number not in added:
            types.append(gguf.TokenType.NORMAL)
        else:
            is_special = added[number].special
            types.append(gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)
    special = gguf.SpecialVocab(base.files.folder, load_merges=True, n_vocab=size)
    # What the tokenizer does with a text, not what its files say of it: the two may differ.
    written = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": written[0] == tokenizer.bos_token_id,
        "eos": written[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _tensors(model: Any, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield every weight under llama.cpp's name, in float32."""
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    is_paired = architecture == gguf.MODEL_ARCH.LLAMA
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise ModelError(f"no GGUF file of a model with a weight {name!r}; {_CURE}")
        layer = name.split(".")[-2]
        is_turned = is_paired and layer in heads
        yield new_name, (_paired(tensor, heads[layer]) if is_turned else tensor).float().numpy()


def _paired(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return a projection whose rows turn by position with the two of a turning pair next to each other.

    transformers keeps the first of all pairs of a head before the second ones; llama.cpp turns neighbours.
    """
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
