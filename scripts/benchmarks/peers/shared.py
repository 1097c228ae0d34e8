"""What the peers share: the outcome of a client's round, PEFT's form of an adapter, the trainer's numbers."""

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.messages import LocalTraining
from fedllm.models.chat import Encoded, encode
from scripts.benchmarks.agreement import Tolerance
from scripts.benchmarks.workloads import Workload

TOLERANCE = Tolerance(0.99, 1e-3)  # on a CPU all peers train in float32


@dataclass(frozen=True, eq=False)
class Outcome:
    """The delta [P] a client sends, and the CPU seconds of the phases it names."""

    delta: torch.Tensor
    phases: Mapping[str, float]


def missing_package(name: str) -> str:
    """Return one line that says how to get a peer's package, or nothing where it is installed."""
    if importlib.util.find_spec(name) is not None:
        return ""
    return f"{name} is not installed, so its column is left out: pip install 'fedllm[bench]'"


def peft_config(layout: AdapterLayout) -> peft.LoraConfig:
    """Return PEFT's form of a layout."""
    modules = [matrix.module for matrix in layout.matrices]
    alpha: Any = layout.alpha  # PEFT declares an int and computes with any number
    return peft.LoraConfig(
        r=layout.rank, lora_alpha=alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def set_adapter(model: Any, layout: AdapterLayout, vector: torch.Tensor) -> None:
    """Give a PEFT model the adapter `vector` [P]."""
    peft.set_peft_model_state_dict(model, {spec.name: view for spec, view in layout.views(vector)})


def read_adapter(model: Any, layout: AdapterLayout) -> torch.Tensor:
    """Return the adapter [P] of a PEFT model."""
    state = peft.get_peft_model_state_dict(model)
    return torch.cat([state[spec.name].detach().float().cpu().reshape(-1) for spec in layout.tensors])


def tokenized(workload: Workload, tokenizer: Any) -> list[Encoded]:
    """Return the workload's rows, tokenised once more."""
    rows = (encode(example, tokenizer, workload.max_length) for example in workload.examples)
    return [row for row in rows if row is not None]


def trainer_numbers(training: LocalTraining, scratch: Path, device: torch.device) -> dict[str, Any]:
    """Return arguments of transformers' trainer and its kin: the engine's numbers, and nothing written.

    On a GPU they train in bfloat16, as they do there by default.
    """
    on_cpu = device.type == "cpu"
    return {
        "output_dir": str(scratch),
        "max_steps": training.steps,
        "per_device_train_batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.clip_norm,
        "train_sampling_strategy": "sequential",
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@contextmanager
def quiet_huggingface() -> Iterator[None]:
    """Silence progress bars, and two names that transformers deprecates while PEFT and trainers use them."""
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
                warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
            yield
    finally:
        datasets.enable_progress_bars()
