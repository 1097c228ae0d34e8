"""What a run computes, counted before it starts: tokens through the model, seconds and bytes of memory.

The unit is one token through the model once, forward. A backward pass through frozen weights costs as much.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.token_budget import CPU_STEP_TOKENS, cpu_budget
from fedllm.models.base import ChosenModel
from fedllm.plan.distillation import DistillationPlan
from fedllm.plan.run_plan import RunPlan

EFFICIENCY = 0.6  # of a large matrix product's rate, what a whole step reaches (attention, small products)
_WRITING_ROWS = 16  # a step that writes one token for each text reads all weights: it costs as if for so many
_PROGRAM_BYTES = 0.6e9  # Python, torch and transformers, before any model
_VALUE_BYTES = {"8bit": 1.0, "4bit": 0.6}  # of a weight, with the scales of its block
_KEPT = 24  # values kept for the way back, of a token in a layer, over the model's width
MEASURED_AT_HOME = 9  # times all held-out rows: twice, half of them under 6 adapters, half under 3
_MATRIX = 512  # a product of this size is about as fast as a model's, and takes a few milliseconds


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
    first = len(rounds) if plan.measures_in_training else 1  # each round's start, or the base model alone
    evaluations = first + sum(plan.is_evaluated(n) for n in rounds) + len(judged)
    personal = plan.personal.steps if plan.personal else 0
    steps = plan.config.train.local_steps
    trained = len(rounds) * (steps + personal) / steps + rounds_at_home(plan)
    at_home = MEASURED_AT_HOME if plan.at_home is not None else 0
    return Work(
        training=training_tokens(tokens_a_round) * trained,
        evaluation=(evaluations * (2 if plan.personal else 1) + at_home) * held_out_tokens,
        distillation=len(due) * distillation_tokens(plan.distillation) if plan.distillation else 0.0,
    )


def rounds_at_home(plan: RunPlan) -> float:
    """Return how many rounds' training it takes that clients train on at home, and alone for comparison.

    Who was asked in every round trains alone as long as in the whole run; the mean client, by its share.
    """
    if plan.at_home is None:
        return 0.0
    both = 2 * plan.at_home.training.steps / plan.config.train.local_steps
    return plan.config.federation.num_rounds + both * plan.config.federation.num_clients / plan.cohort.size


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a matrix product here, measured in milliseconds."""
    size = _MATRIX * (8 if device.type == "cuda" else 1)  # a small product does not fill a GPU
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20):  # the first also starts threads or kernels; some are disturbed
        began = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


@dataclass(frozen=True)
class ModelSize:
    """What the cost of a base model depends on; `multiplying` are its parameters but looked-up embeddings."""

    parameters: int
    multiplying: int
    num_layers: int
    hidden: int


def size_of(skeleton: Any) -> ModelSize:
    """Return the size of a model that transformers has built, with or without storage."""
    parameters = sum(each.numel() for each in skeleton.parameters())
    embedding = skeleton.get_input_embeddings().weight
    head = skeleton.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding
    config = skeleton.config.get_text_config()
    looked_up = 0 if is_tied or skeleton.config.tie_word_embeddings else embedding.numel()
    layers, hidden = (int(getattr(config, name, 0)) for name in ("num_hidden_layers", "hidden_size"))
    return ModelSize(parameters, parameters - looked_up, layers, hidden)


def seconds_of(work: Work, model: ModelSize, rate: float) -> float:
    """Return how long work takes: each parameter multiplies and adds once for a token."""
    return work.total * 2 * model.multiplying / (rate * EFFICIENCY)


def memory_of(
    plan: RunPlan, layout: AdapterLayout, model: ModelSize, chosen: ChosenModel, row_tokens: float
) -> float:
    """Return about how many bytes one process needs that holds all clients of a run, without a GPU's passes.

    The weights; for every client of a pass its adapter, gradient, two moments of AdamW and start; the updates
    of a round, all float32; and what a pass on a CPU keeps of its tokens in every layer.
    """
    train, budget = plan.config.train, plan.config.train.token_budget
    step = max(1.0, row_tokens * train.batch_size)
    tokens = min(max(budget if isinstance(budget, int) else cpu_budget(chosen.dtype), step), CPU_STEP_TOKENS)
    together = min(plan.cohort.size, max(1, int(tokens / step)))
    weights = model.parameters * _VALUE_BYTES.get(chosen.quantization, chosen.dtype.itemsize)
    adapters = 4 * layout.size * (5 * together + plan.cohort.size)
    passes = 0.0 if chosen.device.type == "cuda" else 4 * _KEPT * model.hidden * model.num_layers * tokens
    return _PROGRAM_BYTES + weights + adapters + passes
