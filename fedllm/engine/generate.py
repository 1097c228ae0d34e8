"""Greedy answers to a batch of prompts, and continuations whose tokens the caller chooses.

Tensor suffixes: B row of the batch, t its token, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from fedllm.data.fields import Turn
from fedllm.models.base import BaseModel
from fedllm.models.chat import chat_text

# (places of the rows among all beginnings, logits [B, V]) -> the next token of every row [B]
Choice = Callable[[Sequence[int], torch.Tensor], torch.Tensor]


def answers(
    base: BaseModel, prompts: Sequence[str], max_new_tokens: int, *, as_plain_text: bool = False
) -> list[str]:
    """Return what the model, with the adapters that are attached to it, answers to each prompt.

    Under `as_plain_text` a prompt is no user's turn but the beginning of a text, which is continued.
    """
    tokenizer = base.tokenizer
    texts = list(prompts)
    if not as_plain_text:
        texts = [chat_text(tokenizer, [Turn("user", prompt)], prompt_answer=True) for prompt in prompts]
    special = as_plain_text or not tokenizer.chat_template
    rows = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    # Some tokenizers have no padding token; which one it is does not matter, since the mask hides it.
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    inputs_Bt, mask_Bt = left_padded(rows, filler, base.device)
    output = base.model.generate(
        input_ids=inputs_Bt,
        attention_mask=mask_Bt,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=filler,
    )
    new_tokens = output[:, inputs_Bt.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def continuations(
    base: BaseModel,
    beginnings: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> list[tuple[int, ...]]:
    """Return the tokens that `choose` takes, by their logits, after each beginning of at least one token.

    A row ends with its first end token, which is part of it, or after `max_new_tokens`. `choose` sees the
    model's own logits at temperature 1: no setting of the model's generation counts.
    """
    ends = end_tokens(base)
    # A forward pass without `generate`: that would apply the generation settings of the model to the logits.
    inputs_Bt, mask_Bt = left_padded(beginnings, 0, base.device)
    is_padded = len(set(map(len, beginnings))) > 1
    # Padding does not count as a position, so a row's tokens stand where they would stand alone.
    positions_Bt = (mask_Bt.cumsum(dim=1) - 1).clamp(min=0)
    chosen: list[list[int]] = [[] for _ in beginnings]
    going, cache = [True] * len(beginnings), None
    for _ in range(max_new_tokens):
        places = {"attention_mask": mask_Bt, "position_ids": positions_Bt} if is_padded else {}
        output = base.model(
            input_ids=inputs_Bt, **places, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache, next_B = output.get("past_key_values"), choose(output.logits[:, -1])
        for row, token in enumerate(next_B.tolist()):
            if going[row]:  # a row that has ended is fed on with the others, and what it says is not kept
                chosen[row].append(token)
                going[row] = token not in ends
        if not any(going):
            break
        # Models that keep their state elsewhere (Mamba) read all tokens again.
        inputs_Bt = torch.cat([inputs_Bt if cache is None else inputs_Bt[:, :0], next_B[:, None]], dim=1)
        positions_Bt = positions_Bt[:, -1:] + 1
        mask_Bt = torch.cat([mask_Bt, torch.ones_like(mask_Bt[:, :1])], dim=1)
    return [tuple(tokens) for tokens in chosen]


def left_padded(
    rows: Sequence[Sequence[int]], filler: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of tokens as one tensor and its attention mask, both [B, t].

    Padding goes left, so that every row's next token comes last. A tokenizer that has no padding token would
    refuse to do it.
    """
    length = max(map(len, rows))
    inputs_Bt = torch.tensor([[filler] * (length - len(row)) + list(row) for row in rows], device=device)
    mask_Bt = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return inputs_Bt, mask_Bt


def end_tokens(base: BaseModel) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    named = base.model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in (base.tokenizer.eos_token_id, *listed) if token is not None)
