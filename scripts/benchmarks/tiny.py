"""A tiny random language model and short rows of text, made here: benchmarks of everything but arithmetic.

With next to nothing to compute, what a run costs is what surrounds the computing.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from fedllm.models.files import quiet_transformers
from scripts.benchmarks.tokenizer import byte_tokenizer

_VERBS = ("Return", "Open", "Sort", "Raise", "Convert", "Read", "Count", "Close")
_NOUNS = ("the list", "a file", "two numbers", "the string", "an error", "the value", "its lines")


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
