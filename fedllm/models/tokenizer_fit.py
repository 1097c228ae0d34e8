"""Whether a base model can read what its tokenizer writes: embeddings for the tokens, positions for the rows.

Both follow from the model's files without its weights. So a run that would fail in its first step, on a GPU
by an assertion of the device, is refused before anybody joins.
"""

from typing import Any

import torch

from fedllm.errors import ModelError
from fedllm.models.chat import form_tokens
from fedllm.models.files import ModelFiles, first_line
from fedllm.models.panics import panics_refused

_OFFSET = 8  # some tables have a few positions more than there is room for, as OPT's


def num_embeddings(files: ModelFiles) -> int | None:
    """Return the number of tokens that a model has an embedding for, None where its configuration is silent.

    Raises:
        ModelError: it is of an architecture transformers does not know.
    """
    return getattr(_read_config(files).get_text_config(decoder=True), "vocab_size", None)


def check_tokenizer_fits(files: ModelFiles, tokenizer: Any, max_length: int) -> str:
    """Return a warning about rows of `max_length` tokens, "" where there is nothing to say.

    Special tokens that no template writes may lack an embedding: Gemma 3's text models have one for images.

    Raises:
        ModelError: the tokenizer breaks down, it writes tokens that the model has no embedding for, or the
            model has no position for some of `max_length` tokens.
    """
    known = num_embeddings(files)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    written = {*_written_tokens(files, tokenizer), tokenizer.eos_token_id or 0}
    highest = max(written | (set(tokenizer.get_vocab().values()) - special))
    if known is not None and highest >= known:
        raise ModelError(
            f"{files.public_name}: its tokenizer has {highest + 1:,} tokens, its embedding {known:,}, so some"
            " rows could not be read; take the model's own tokenizer, or resize the embedding"
        )
    config = _read_config(files)
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(positions, int) or not 0 < positions < max_length:
        return ""
    told = f"train.max-length = {max_length}, but {files.public_name} has {positions} positions"
    if _has_position_table(config, positions, files.runs_own_code):
        raise ModelError(f"{told} and can read no longer row; set it to {positions} at most")
    return f"{told} by its configuration: longer rows are beyond what it was made for"


def _written_tokens(files: ModelFiles, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that every conversation has."""

    def refusal(kind: str) -> ModelError:
        return ModelError(
            f"{files.public_name}: its tokenizer breaks down ({kind}) even on a conversation without words;"
            " take the model's files anew, or choose another model.name"
        )

    with panics_refused(refusal):
        return form_tokens(tokenizer)


def _has_position_table(config: Any, positions: int, trusted: bool) -> bool:
    """Return whether a model looks its positions up in a table, rather than to compute them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # shapes without storage
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    return any(
        ("pos" in name.lower() or ".wpe." in name)
        and table.dim() == 2
        and 0 <= table.shape[0] - positions <= _OFFSET
        for name, table in (*model.named_parameters(), *model.named_buffers())
    )


def _read_config(files: ModelFiles) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(files.folder, trust_remote_code=files.runs_own_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read {files.public_name}: {first_line(error)}") from None
