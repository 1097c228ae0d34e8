"""Tiny models and clients built in code: no network, no shared files, a second or two."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the network

import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.config.keys import ModelConfig
from fedllm.models.base import BaseModel, load_base

with warnings.catch_warnings():  # Flower's typer touches deprecated names of click when it is imported
    warnings.simplefilter("ignore", DeprecationWarning)
    import flwr.app  # noqa: F401

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter, value by value; it reads this once, when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_PATIENCE = 600  # seconds; the longest test takes a quarter of that on two busy cores

SENTENCES = (
    "Return the sum of two numbers.",
    "Open a file and read its lines.",
    "Sort the list in place and return it.",
    "Raise an error when the value is negative.",
    "Convert a string to lower case letters.",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """Let PEFT be used: it reads a deprecated name of transformers."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing`:FutureWarning")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where no CUDA device is, and `soak` unless it is asked for."""
    if item.get_closest_marker("soak") and "soak" not in item.config.option.markexpr:
        pytest.skip("takes long: bash scripts/soak.sh")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bound each test's time, so that one that hangs is named, and put the tests in order.

    The stories, which mostly wait for processes of their own, are dealt out among the modules that compute:
    each of several test processes begins with a stretch of this order.
    """
    for item in items:
        if not item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(_PATIENCE))
    if not hasattr(config, "workerinput"):
        return
    number = config.workerinput["workercount"]
    stories = [item for item in items if _is_story(item)]
    stories = [item for start in range(number) for item in stories[start::number]]
    others = [item for item in items if not _is_story(item)]
    items[:] = []
    placed, seen = 0, 0
    for _, module in groupby(others, key=lambda item: item.path):  # whole, for the fixtures that it shares
        due = -(-len(stories) * (seen + 1) // len(others))  # rounded up: one comes first
        before, placed = stories[placed:due], due
        items += [*before, *module]
        seen = len(items) - placed
    items += stories[placed:]


def _is_story(item: pytest.Item) -> bool:
    return "stories" in item.path.parts


def _train_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _build_model(kind: str, tokens: dict[str, int]) -> Any:
    import transformers

    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    }
    if kind == "gpt2":
        shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256}
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **no_dropout, **tokens))
    if kind == "gemma3":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        config = transformers.Gemma3TextConfig(**small, **heads, **window, **tokens)
        return transformers.Gemma3ForCausalLM(config)
    if kind == "gemma2":  # caps its attention scores, so it cannot attend over a flat row
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small, **heads, **tokens))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **heads, **tokens))


@pytest.fixture(scope="session")
def make_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (kind, seed) -> folder of a tiny saved model with a tokenizer."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str = "llama", seed: int = 0) -> Path:
        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{kind}-{seed}")
            size = _train_tokenizer(folder)
            torch.manual_seed(seed)
            tokens = {"vocab_size": size, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 4}
            _build_model(kind, tokens).save_pretrained(folder)
            made[kind, seed] = folder
        return made[kind, seed]

    return make


@pytest.fixture(scope="session")
def load_tiny(make_model_folder: Callable[..., Path]) -> Callable[..., BaseModel]:
    """Return a function (kind, dtype, device) -> a loaded tiny base model, kept for the session."""
    loaded: dict[tuple[str, str, str], BaseModel] = {}

    def load(kind: str = "llama", dtype: str = "float32", device: str = "cpu") -> BaseModel:
        if (kind, dtype, device) not in loaded:
            config = ModelConfig(name=str(make_model_folder(kind)), dtype=dtype, device=device)
            loaded[kind, dtype, device] = load_base(config)
        return loaded[kind, dtype, device]

    return load


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Return where Triton's kernels run: on a CUDA device, or in the interpreter."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _default_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test against the default site policy, whatever policy the machine's user has."""
    monkeypatch.setenv("FEDLLM_SITE", "")
