"""Base models and rows for benchmarks that need no text: random models of a named shape, or a real one.

What a pass costs depends on shapes alone, so random weights and random tokens serve. Nothing is downloaded
for them and nothing is saved.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.engine.engine import Engine
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel, choose_device, choose_dtype, layout_of, load_base
from fedllm.models.chat import IGNORED, Encoded
from fedllm.models.files import EMBEDDED_ALIAS, ModelFiles, quiet_transformers

END, PAD, USER, ASSISTANT, SYSTEM = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"
_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Return a byte-pair tokenizer of at most `vocabulary` tokens, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD, USER, ASSISTANT, SYSTEM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD, chat_template=_CHAT)


TINY, REAL = "tiny", EMBEDDED_ALIAS
SMALL, LARGE = "random-135m", "random-1.5b"
# Llamas by name. "tiny" is small enough that calls cost as much as arithmetic; the others are as large as
# SmolLM2-135M and Qwen2.5-1.5B.
SHAPES = {
    TINY: {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    SMALL: {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    LARGE: {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


def bench_base(name: str, device: str = "auto", dtype: str = "auto") -> BaseModel:
    """Return the random model of that shape, or else load the base model of that name.

    Raises:
        ModelError: the device does not exist, or the model cannot be loaded.
    """
    chosen = choose_device(device)
    kind = choose_dtype(dtype, chosen)  # float32 on any CPU: what is compared with computes in it
    if name not in SHAPES:
        return load_base(ModelConfig(name=name, device=device, dtype=str(kind).removeprefix("torch.")))
    return random_base(name, chosen, kind)


def bench_engine(name: str, device: str, targets: str, dtype: str = "auto") -> Engine:
    """Return an engine on the model of that name, with adapters on the layers `targets`.

    Raises:
        ModelError: the device does not exist, or the model cannot be loaded.
    """
    base = bench_base(name, device, dtype)
    return Engine(base, layout_of(base.model, LoraConfig(target_modules=targets), base.fingerprint))


def plain_training(steps: int, batch_size: int, clip_norm: float = 1.0) -> LocalTraining:
    """Return local training whose other numbers do not matter to what it costs."""
    return LocalTraining(
        steps=steps, batch_size=batch_size, learning_rate=1e-3, weight_decay=0.0, clip_norm=clip_norm
    )


def random_llama(name: str, **shape: int) -> Any:
    """Return a frozen random Llama of a shape of `SHAPES`; `shape` replaces numbers of it.

    It is made on torch's current device, where a large one takes no time on a GPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES[name], **shape}, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).requires_grad_(False).eval()


def random_base(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> BaseModel:
    """Return `random_llama` as a base model; it has no tokenizer."""
    with device:
        model = random_llama(name).to(dtype=dtype)
    fingerprint = hashlib.sha256(repr((name, SHAPES[name])).encode()).hexdigest()
    return BaseModel(model, None, ModelFiles(Path(), name), fingerprint, device, dtype)


def random_rows(
    lengths: Sequence[int], vocabulary: int, seed: int, learnt_share: float
) -> tuple[Encoded, ...]:
    """Return rows of random tokens; the last part of each, at least one token, is learnt."""
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


_VERBS = ("Return", "Open", "Sort", "Raise", "Convert", "Read", "Count", "Close")
_NOUNS = ("the list", "a file", "two numbers", "the string", "an error", "the value", "its lines")


def save_random_model(folder: Path, name: str) -> Path:
    """Write the random Llama of a shape of `SHAPES` and a tokenizer to `folder`, and return it."""
    byte_tokenizer([answer for _, answer in _sentences()], 400).save_pretrained(folder)
    with quiet_transformers():
        random_llama(name).save_pretrained(folder)
    return folder


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write a random Llama of two layers and its tokenizer to `folder`, and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer([answer for _, answer in _sentences()], 400)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, num_clients: int, rows_per_client: int) -> Path:
    """Write as many different rows for every client as asked, with its name in the column "client"."""
    pairs = list(_sentences())
    with path.open("w") as file:
        for client in range(num_clients):
            for row in range(rows_per_client):
                prompt, answer = pairs[(client + row) % len(pairs)]
                values = {"prompt": f"{prompt} {client} {row}", "response": answer}
                file.write(json.dumps({**values, "client": f"client-{client:04d}"}) + "\n")
    return path


def _sentences() -> Iterator[tuple[str, str]]:
    for verb in _VERBS:
        for noun in _NOUNS:
            yield f"def {verb.lower()}({noun.split()[-1]})", f"{verb} {noun}."
