"""DP-SGD on PEFT's LoRA model with Opacus, by hooks or by ghost clipping, to compare fedllm's engine with.

Opacus is used as its users do: padded batches, transformers' own forward pass with all logits, an optimizer
wrapped by Opacus. It adds no noise here, so that what it computes can be compared.

What Opacus 1.6 needs to work with transformers 5.23 and PEFT 0.21:

- The base model is on its device before `get_peft_model`, or the LoRA weights silently never move
  (meta-pytorch/opacus#820); comparing deltas would show it.
- The model is in training mode, or the hooks stay silent. Dropout is 0.
- Attention may be transformers' default (sdpa): only the LoRA layers, plain `nn.Linear`, are hooked.
- The lowest of them read inputs that need no gradient; torch warns of it, but their gradients are right.
"""

import copy
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch.nn.functional import cross_entropy

from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.head import precise
from fedllm.engine.jobs import Job
from fedllm.errors import MissingExtraError
from fedllm.models.chat import IGNORED, Encoded


def require_opacus() -> None:
    """Return where Opacus is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("opacus") is None:
        raise MissingExtraError("this benchmark needs Opacus: pip install 'fedllm[bench]'")


@dataclass(frozen=True)
class Padded:
    """Rows padded at the right to the longest: `tokens`, `labels` and `mask` are [B, T]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


class OpacusTrainer:
    """A resident PEFT model under Opacus, trained on one job after another.

    It shares the frozen weights of `model`, and has LoRA layers and hooks of its own.

    Raises:
        MissingExtraError: Opacus is absent.
    """

    def __init__(self, model: Any, layout: AdapterLayout, *, ghost: bool):
        require_opacus()
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

        self.ghost = ghost
        twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        lora = peft.LoraConfig(
            r=layout.rank,
            lora_alpha=layout.alpha,
            target_modules=[matrix.module for matrix in layout.matrices],
            lora_dropout=0.0,
        )
        tuned = peft.get_peft_model(twin, lora)
        named = dict(tuned.named_parameters())
        self.layout = layout
        self.weights = [named[spec.name.replace(".weight", ".default.weight")] for spec in layout.tensors]
        wrap = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
        self.module = wrap(tuned.train(), loss_reduction="mean")

    def train(self, job: Job) -> torch.Tensor:
        """Return the delta [P] of a job whose rows are clipped at `job.example_clip`."""
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        self.load(job.start)
        numbers = job.training
        adamw = torch.optim.AdamW(
            self.weights, lr=numbers.learning_rate, betas=(0.9, 0.999), weight_decay=numbers.weight_decay
        )
        wrap = DPOptimizerFastGradientClipping if self.ghost else DPOptimizer
        optimizer = wrap(
            adamw,
            noise_multiplier=0.0,
            max_grad_norm=job.example_clip,
            expected_batch_size=numbers.batch_size,
            loss_reduction="mean",
        )
        if self.ghost:
            self.module.max_grad_norm = job.example_clip
        for batch in job.batches:
            optimizer.zero_grad()
            self.backward(batch, optimizer)
            optimizer.step()
        optimizer.zero_grad()  # the rows' gradients, too
        return (self.values() - job.start.to(self.weights[0])).cpu()

    def backward(self, batch: Sequence[Encoded], optimizer: Any) -> None:
        """Leave the gradient of every row, or with `ghost` the sum of the clipped ones, at the weights."""
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        losses_B = self.losses(batch)
        if self.ghost:
            DPTensorFastGradientClipping(self.module, optimizer, losses_B, "mean").backward()
        else:
            losses_B.mean().backward()  # type: ignore[no-untyped-call]

    def losses(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """Return every row's mean loss over its learnt tokens, [B]."""
        padded = pad(batch, self.weights[0].device)
        logits = self.module(input_ids=padded.tokens, attention_mask=padded.mask).logits[:, :-1]
        labels_BT = padded.labels[:, 1:]
        losses_BT = cross_entropy(
            logits.to(precise(logits.dtype)).transpose(1, 2),
            labels_BT,
            ignore_index=IGNORED,
            reduction="none",
        )
        return losses_BT.sum(1) / (labels_BT != IGNORED).sum(1)

    def example_norms(self, job: Job) -> torch.Tensor:
        """Return the gradient norm of every row of a job's first batch, [B]; not for `ghost`."""
        self.load(job.start)
        self.backward(job.batches[0], None)
        squares = [weight.grad_sample.flatten(1).square().sum(1) for weight in self.weights]
        for weight in self.weights:
            weight.grad_sample = None
        return torch.stack(squares).sum(0).sqrt()

    def load(self, start: torch.Tensor) -> None:
        """Put an adapter's values [P] into the weights, and forget all gradients."""
        with torch.no_grad():
            for weight, (_, value) in zip(self.weights, self.layout.views(start), strict=True):
                weight.copy_(value)
                weight.grad = None

    def values(self) -> torch.Tensor:
        """Return the weights' values [P]."""
        return torch.cat([weight.detach().reshape(-1) for weight in self.weights])


def pad(batch: Sequence[Encoded], device: torch.device) -> Padded:
    """Return rows as one rectangle."""
    longest = max(len(row.tokens) for row in batch)

    def rectangle(rows: Sequence[tuple[int, ...]], filler: int) -> torch.Tensor:
        return torch.tensor([row + (filler,) * (longest - len(row)) for row in rows], device=device)

    return Padded(
        rectangle([row.tokens for row in batch], 0),
        rectangle([row.labels for row in batch], IGNORED),
        rectangle([(1,) * len(row.tokens) for row in batch], 0),
    )


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Silence a name that transformers deprecates, and what torch says of hooks on the lowest layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield
