"""Base models and rows for benchmarks that need no text: random models of a named shape, or a real one.

What a pass costs depends on shapes alone, so random weights and random tokens serve. Nothing is downloaded
for them and nothing is saved.
"""

import hashlib
import random
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm.config import ModelConfig
from fedllm.models.base import BaseModel, choose_device, choose_dtype, load_base
from fedllm.models.chat import IGNORED, Encoded
from fedllm.models.files import EMBEDDED_ALIAS, ModelFiles
from scripts.benchmarks.plots import plot_file

TINY, REAL = "tiny", EMBEDDED_ALIAS

# Llamas by name. "tiny" is small enough that calls cost as much as arithmetic; the other is as large as
# Qwen2.5-1.5B.
SHAPES = {
    TINY: {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "random-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


def add_model_options(parser: ArgumentParser) -> None:
    """Add the options of a benchmark of the tiny model and one other."""
    parser.add_argument("--model", default=REAL, help="after the tiny one: a base model, or random-1.5b")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--targets", default="all-linear", help="adapted layers, as lora.target-modules")
    parser.add_argument("--plot", type=plot_file, help="draw the base model's ratios to this SVG or PNG file")


def bench_base(name: str, device: str = "auto", dtype: str = "auto") -> BaseModel:
    """Return the random model of that shape, or else load the base model of that name.

    Raises:
        ModelError: the device does not exist, or the model cannot be loaded.
    """
    if name not in SHAPES:
        return load_base(ModelConfig(name=name, device=device, dtype=dtype))
    chosen = choose_device(device)
    return random_base(name, chosen, choose_dtype(dtype, chosen))


def random_llama(name: str, **shape: int) -> Any:
    """Return a frozen random Llama of a shape of `SHAPES`; `shape` replaces numbers of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES[name], **shape}, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).requires_grad_(False).eval()


def random_base(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> BaseModel:
    """Return `random_llama` as a base model; it has no tokenizer."""
    model = random_llama(name).to(device=device, dtype=dtype)
    fingerprint = hashlib.sha256(repr((name, SHAPES[name])).encode()).hexdigest()
    return BaseModel(model, None, ModelFiles(Path(), name), fingerprint, device, dtype)


def random_rows(
    lengths: Sequence[int], vocabulary: int, seed: int, learnt_share: float
) -> tuple[Encoded, ...]:
    """Return rows of random tokens, of which the last part of each, at least one token, is learnt."""
    generator = random.Random(seed)
    rows = []
    for length in lengths:
        tokens = tuple(generator.randrange(vocabulary) for _ in range(length))
        prompt = min(length - 1, round(length * (1 - learnt_share)))
        rows.append(Encoded(tokens, (IGNORED,) * prompt + tokens[prompt:]))
    return tuple(rows)


def vocabulary_of(base: BaseModel) -> int:
    """Return how many tokens a model knows."""
    size: int = base.model.config.get_text_config().vocab_size
    return size
