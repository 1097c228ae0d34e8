"""What a run computes, counted before it starts: tokens through the model, seconds and bytes of memory.

The unit is one token through the model once, forward. A backward pass through frozen weights costs as much.
"""

import time
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.plan.distillation import DistillationPlan
from fedllm.plan.run_plan import RunPlan

EFFICIENCY = 0.6  # of a large matrix product's rate, what a whole step reaches (attention, small products)
_WRITING_ROWS = 16  # a step that writes one token for each text reads all weights: it costs as if for so many
_PROGRAM_BYTES = 0.6e9  # Python, torch and transformers, before any model
_MATRIX = 1024  # a product of this size is large enough to be as fast as a model's, and takes milliseconds


@dataclass(frozen=True)
class Work:
    """The tokens of a run's parts: all its training, all its evaluations, all its distillation steps."""

    training: float
    evaluation: float
    distillation: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.training + self.evaluation + self.distillation


def training_tokens(trained: float) -> float:
    """Return the work of training on so many tokens: forward and backward."""
    return 2 * trained


def distillation_tokens(plan: DistillationPlan) -> float:
    """Return the most work of one distillation step: texts are written, taught, learnt and measured."""
    numbers = plan.numbers
    texts, held_out = numbers.num_texts + plan.num_held_out, plan.num_held_out
    taught = texts * numbers.max_teachers  # every teacher reads every text
    learnt = training_tokens(numbers.steps * numbers.batch_size) * (2 if numbers.control else 1)
    written = max(texts, _WRITING_ROWS) if plan.has_synthetic or plan.public_source else 0
    return numbers.max_tokens * (written + taught + learnt + 3 * held_out)


def work_of(plan: RunPlan, *, tokens_a_round: float, held_out_tokens: float) -> Work:
    """Return the work of a whole run whose rounds train on so many tokens, with so many held out in all."""
    rounds = range(1, plan.config.federation.num_rounds + 1)
    due = [n for n in rounds if plan.distillation is not None and plan.distillation.is_due(n)]
    judged = due if plan.distillation is not None and plan.distillation.asks_clients else []
    evaluations = 1 + sum(plan.is_evaluated(n) for n in rounds) + len(judged)  # the base model's comes first
    personal = plan.personal.steps if plan.personal else 0
    steps = plan.config.train.local_steps
    return Work(
        training=training_tokens(tokens_a_round) * len(rounds) * (steps + personal) / steps,
        evaluation=evaluations * held_out_tokens * (2 if plan.personal else 1),
        distillation=len(due) * distillation_tokens(plan.distillation) if plan.distillation else 0.0,
    )


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a matrix product here, measured in milliseconds."""
    left, right = (torch.randn(_MATRIX, _MATRIX, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first also starts threads or kernels
        began = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * _MATRIX**3 / best


def seconds_of(work: float, num_parameters: int, rate: float) -> float:
    """Return how long work takes on a model whose parameters each multiply and add once for a token."""
    return work * 2 * num_parameters / (rate * EFFICIENCY)


def memory_bytes(
    layout: AdapterLayout,
    *,
    model_bytes: float,
    num_layers: int,
    hidden: int,
    pass_tokens: float,
    num_clients: int,
) -> float:
    """Return about how much memory a process needs that trains so many clients at once on one model.

    The model's weights; of each client the adapter, its gradient, two moments of AdamW, the start (float32);
    and what a pass keeps of its tokens in every layer for the way back.
    """
    adapters = 5 * 4 * layout.size * num_clients
    activations = 4 * 24 * hidden * num_layers * pass_tokens  # about 24 vectors of the model's width a layer
    return _PROGRAM_BYTES + model_bytes + adapters + activations
