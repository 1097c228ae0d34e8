import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from fedllm.errors import ModelError
from fedllm.models.files import ModelFiles
from fedllm.models.tokenizer_fit import check_tokenizer_fits, num_embeddings


@pytest.fixture
def tokenizer(make_model_folder: Callable) -> Any:
    return AutoTokenizer.from_pretrained(make_model_folder())


@pytest.fixture
def files(make_model_folder: Callable) -> ModelFiles:
    return ModelFiles(make_model_folder(), "tiny")


def test_a_model_reads_what_its_own_tokenizer_writes(files: ModelFiles, tokenizer: Any) -> None:
    assert check_tokenizer_fits(files, tokenizer, 64) == ""
    assert num_embeddings(files) == AutoConfig.from_pretrained(files.folder).vocab_size


def test_words_without_an_embedding_are_refused(files: ModelFiles, tokenizer: Any) -> None:
    tokenizer.add_tokens(["item", "long"])
    known = num_embeddings(files)
    with pytest.raises(ModelError, match=f"{known + 2:,} tokens, its embedding {known:,}"):
        check_tokenizer_fits(files, tokenizer, 64)


def test_a_special_token_needs_an_embedding_where_rows_have_it(files: ModelFiles, tokenizer: Any) -> None:
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert check_tokenizer_fits(files, tokenizer, 64) == ""
    tokenizer.eos_token = "<image>"
    with pytest.raises(ModelError, match="embedding"):
        check_tokenizer_fits(files, tokenizer, 64)


def test_a_special_token_of_the_template_needs_an_embedding(files: ModelFiles, tokenizer: Any) -> None:
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="embedding"):
        check_tokenizer_fits(files, tokenizer, 64)


def test_a_template_may_refuse_turns_without_words(files: ModelFiles, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    assert check_tokenizer_fits(files, tokenizer, 64) == ""


def test_a_tokenizer_that_panics_on_anything_is_named(
    files: ModelFiles, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Panic(BaseException):
        pass

    def panic(*arguments: Any, **options: Any) -> Any:
        os.write(2, b"thread panicked\n")
        raise Panic

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", panic)
    with pytest.raises(ModelError, match=r"tiny: its tokenizer breaks down \(Panic\)"):
        check_tokenizer_fits(files, tokenizer, 64)
    assert capfd.readouterr().err == ""


SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_positions=32, n_embd=8, n_head=2, n_layer=1),
        GPTJConfig(n_positions=32, n_embd=8, n_head=2, n_layer=1, rotary_dim=4),
        OPTConfig(max_position_embeddings=32, ffn_dim=8, word_embed_proj_dim=8, **SMALL),
    ],
    ids=["gpt2", "gptj", "opt"],
)
def test_a_row_beyond_a_table_of_positions_is_refused(config: Any, tokenizer: Any, tmp_path: Path) -> None:
    config.vocab_size = len(tokenizer)
    config.save_pretrained(tmp_path)
    assert check_tokenizer_fits(ModelFiles(tmp_path, "tiny"), tokenizer, 32) == ""
    with pytest.raises(ModelError, match=r"train\.max-length = 33.* 32 positions"):
        check_tokenizer_fits(ModelFiles(tmp_path, "tiny"), tokenizer, 33)


def test_a_row_beyond_computed_positions_is_a_warning(tokenizer: Any, tmp_path: Path) -> None:
    config = LlamaConfig(max_position_embeddings=32, intermediate_size=8, vocab_size=len(tokenizer), **SMALL)
    config.save_pretrained(tmp_path)
    assert check_tokenizer_fits(ModelFiles(tmp_path, "tiny"), tokenizer, 32) == ""
    warning = check_tokenizer_fits(ModelFiles(tmp_path, "tiny"), tokenizer, 33)
    assert "train.max-length = 33" in warning
    assert "32 positions" in warning
