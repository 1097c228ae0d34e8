"""Greedy answers to a batch of prompts."""

from collections.abc import Sequence

from fedllm.data.example import Turn
from fedllm.models.base import BaseModel
from fedllm.models.chat import chat_text


def answers(base: BaseModel, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Return what the model, with whatever adapters are on it, answers to each prompt."""
    tokenizer = base.tokenizer
    texts = [chat_text(tokenizer, [Turn("user", prompt)], prompt_answer=True) for prompt in prompts]
    special = not tokenizer.chat_template
    rows = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Padding goes left, so that every row's next token comes last.
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(base.device)
    output = base.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=filler
    )
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
