"""Tiny models and clients built in code: no network, no shared files, a second or two."""

from pathlib import Path

import pytest
import torch

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


def _train_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

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


def _save_model(folder: Path, kind: str, vocab_size: int, seed: int) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokens = {"vocab_size": vocab_size, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 4}
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **tokens)
        )
    elif kind == "gemma3":
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, sliding_window=8,
                layer_types=["sliding_attention", "full_attention"], **tokens,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=True, **tokens,
            )
        )
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def make_model_folder(tmp_path_factory):
    """Return a function (kind, seed) -> folder of a tiny saved model with a tokenizer."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str = "llama", seed: int = 0) -> Path:
        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{kind}-{seed}")
            _save_model(folder, kind, _train_tokenizer(folder), seed)
            made[kind, seed] = folder
        return made[kind, seed]

    return make
