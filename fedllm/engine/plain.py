"""The plain twin of the engine: PEFT, padding, torch's AdamW. Read this first; the engine must agree with it.

It does for one client what a textbook would, and pays what a textbook pays: padded tokens, logits of every
prompt token, one kernel per tensor. Tests assert that both give the same delta.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.parts import part_specs
from fedllm.engine.dropout import NoisyRow, row_mask
from fedllm.engine.jobs import Job, row_seed
from fedllm.models.base import BaseModel
from fedllm.models.chat import IGNORED, Encoded


def train_plainly(base: BaseModel, layout: AdapterLayout, job: Job) -> torch.Tensor:
    """Return the delta [P] of one job, on the base model's device. The base model is left as it was."""
    modules = [matrix.module for matrix in layout.matrices]
    lora = LoraConfig(r=layout.rank, lora_alpha=layout.alpha, target_modules=modules, lora_dropout=0.0)
    model = get_peft_model(base.model, lora, autocast_adapter_dtype=False)
    try:
        return _train(model, base.device, layout, job)
    finally:
        model.unload()  # or a failure would leave PEFT's layers in the base model


def _train(model: Any, device: torch.device, layout: AdapterLayout, job: Job) -> torch.Tensor:
    """Return the delta [P] of a job on the base model with PEFT's layers in it."""
    trained = {spec.name for spec in part_specs(layout, job.trained)}
    parameters = [dict(model.named_parameters())[_peft_name(spec.name)] for spec in layout.tensors]
    with torch.no_grad():
        for parameter, (spec, start) in zip(parameters, layout.views(job.start), strict=True):
            parameter.copy_(start)
            if spec.name not in trained:
                parameter.requires_grad_(False)
    numbers = job.training
    moving = [parameter for parameter in parameters if parameter.requires_grad]
    dropouts = [RowDropout(index) for index in range(len(layout.matrices))]
    # PEFT's own dropout would draw its numbers from torch's global state.
    for matrix, dropout in zip(layout.matrices, dropouts, strict=True):
        model.base_model.model.get_submodule(matrix.module).lora_dropout["default"] = dropout
    optimizer = torch.optim.AdamW(
        moving, lr=numbers.learning_rate, betas=(0.9, 0.999), weight_decay=numbers.weight_decay
    )
    for step, batch in enumerate(job.batches):
        noise = [
            NoisyRow(0, len(row.tokens), numbers.dropout, row_seed(job, step, number))
            for number, row in enumerate(batch)
        ]
        for dropout in dropouts:
            dropout.rows = noise
        optimizer.zero_grad()
        # The client's own terms join before its gradient is clipped, as in the engine.
        loss = _mean_loss(model, device, batch) + _proximal_loss(parameters, layout, job)
        loss.backward()  # type: ignore[no-untyped-call]
        if job.correction is not None:
            for parameter, (_, correction) in zip(parameters, layout.views(job.correction), strict=True):
                assert parameter.grad is not None
                parameter.grad += correction.to(parameter)
        if numbers.clip_norm:
            torch.nn.utils.clip_grad_norm_(moving, numbers.clip_norm)
        optimizer.step()
    after = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    return after - job.start.to(after)


def _mean_loss(model: Any, device: torch.device, batch: Sequence[Encoded]) -> torch.Tensor:
    """Return the mean loss over the learnt tokens of a batch, padded to its longest row."""
    length = max(len(row.tokens) for row in batch)

    def padded(rows: Sequence[tuple[int, ...]], filler: int) -> torch.Tensor:
        return torch.tensor([row + (filler,) * (length - len(row)) for row in rows], device=device)

    tokens = padded([row.tokens for row in batch], 0)
    labels = padded([row.labels for row in batch], IGNORED)
    mask = padded([(1,) * len(row.tokens) for row in batch], 0)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


class RowDropout(nn.Module):
    """PEFT's LoRA dropout with the engine's numbers: row b of a padded batch is dropped by `rows[b]`."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self.rows: Sequence[NoisyRow] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [B, t, I] with every row's values dropped or scaled up."""
        mask = torch.ones_like(x)  # padded places are never dropped: nothing reads them
        for b, row in enumerate(self.rows):
            if row.rate:
                mask[b, : row.end] = row_mask(row, self.index, x[b])
        return x * mask


def _proximal_loss(parameters: list[torch.Tensor], layout: AdapterLayout, job: Job) -> torch.Tensor:
    """Return the FedProx penalty, with dense products: see `fedllm.engine.gradient_terms`."""
    anchors = [view.to(parameters[0]) for _, view in layout.views(job.start)]
    if job.training.proximal_space == "factor":
        squares = [(p - anchor).square().sum() for p, anchor in zip(parameters, anchors, strict=True)]
    else:
        factors = zip(parameters[0::2], parameters[1::2], anchors[0::2], anchors[1::2], strict=True)
        squares = [(layout.scale * (b @ a - b0 @ a0)).square().sum() for a, b, a0, b0 in factors]
    return job.training.proximal / 2 * torch.stack(squares).sum()


def _peft_name(saved_name: str) -> str:
    """Return PEFT's in-memory name of a tensor; a saved adapter leaves out the adapter's own name."""
    return saved_name.replace(".weight", ".default.weight")
