"""One client round: fedllm's engine beside a client that starts afresh, as FlowerTune's does.

FlowerTune's ClientApp (adap/flower, examples/flowertune-llm) answers every message by loading the base model,
wrapping it with PEFT, loading the tokenizer and building a trainer, and it trains with gradient checkpointing
on padded batches. `train_afresh` does the same on current libraries; `Engine.train` keeps the base model and
the rows' tokens resident. Both get the same start, rows, order, label masks and AdamW, and must give the same
adapter before anything is timed.

    python -m scripts.bench_client --quick --json

What is made easy for the baseline: it tokenises only the rows it trains on (FlowerTune: its whole partition),
it loads from a warm page cache in float32 without quantising, its trainer logs and saves nothing, and wire
encoding is left out on both sides. Dropout is 0 on both sides so that results can be compared; FlowerTune
uses 0.075.
"""

import argparse
import ast
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a look-up would be timed

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from clients.holder import hosted_rows
from fedllm.adapters.layout import AdapterLayout, initial_adapter
from fedllm.config import RunConfig
from fedllm.data.example import Example, Turn
from fedllm.data.packages import installed_packages, source_files
from fedllm.data.shards import draw_rows
from fedllm.models.base import layout_of, load_base, target_modules
from fedllm.models.chat import encode
from fedllm.models.files import quiet_transformers
from fedllm.seeds import derive_seed
from fedllm.training.engine import Engine
from fedllm.training.jobs import Job
from fedllm.types import LocalTraining
from scripts.bench_tools import (
    Goal,
    Measured,
    Phases,
    alternate,
    emit,
    environment,
    figures_table,
    gemm_rate,
    ratios,
    report,
    spread,
    timed,
)

OURS, AFRESH, NO_CHECKPOINTING = "fedllm", "afresh", "afresh, no checkpointing"
PACKAGES = ("fedllm", "torch", "transformers", "peft", "accelerate", "safetensors")
# A is +-1 times the learning rate per step where gradients are tiny, so float32 rounding shows there first.
TOLERANCE = 1e-4  # of the largest difference between two deltas, relative to the largest movement
GOAL_RATIO = 1.5


@dataclass(frozen=True, eq=False)
class Workload:
    """One client's work in a round, as text and as the engine's job."""

    name: str
    examples: tuple[Example, ...]
    job: Job
    layout: AdapterLayout

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [len(row.tokens) for batch in self.job.batches for row in batch]

    @property
    def num_supervised(self) -> int:
        """Tokens whose prediction is learnt."""
        return sum(row.num_supervised for batch in self.job.batches for row in batch)

    @property
    def num_padded(self) -> int:
        """Token slots of batches that are padded to their longest row."""
        return sum(len(batch) * max(len(row.tokens) for row in batch) for batch in self.job.batches)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The delta [P] a client sends, and the CPU seconds of the phases it names."""

    delta: torch.Tensor
    phases: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Bench:
    """What every variant shares: the resident engine, where the base model lies, and the rows' numbers."""

    engine: Engine
    folder: Path
    training: LocalTraining
    client_id: str
    seed: int


def open_bench(options: argparse.Namespace) -> tuple[Bench, RunConfig]:
    """Load the base model and build the engine, once, as a client process does."""
    config = RunConfig.from_flat(
        {
            "seed": options.seed,
            "lora.rank": 8,
            "lora.alpha": 16.0,
            "lora.target-modules": "q_proj,v_proj",
            "train.local-steps": 4,
            "train.batch-size": 4,
            "train.max-length": 128,
        }
    )
    train = config.train
    training = LocalTraining(
        steps=train.local_steps,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        max_length=train.max_length,
    )
    base = load_base(config.model)
    engine = Engine(base, layout_of(base.model, config.lora, base.fingerprint))
    return Bench(engine, base.files.folder, training, options.client, options.seed), config


def first_sentences(bench: Bench, config: RunConfig) -> list[Example]:
    """Return the rows of the client in fedllm's default source: a signature, a docstring's first sentence."""
    return next(list(rows.train) for rows in hosted_rows(config, {}) if rows.client_id == bench.client_id)


def whole_docstrings(bench: Bench, most: int = 400) -> list[Example]:
    """Return rows of the same package with whole docstrings as answers: longer, and most of it learnt."""
    package = next(package for package in installed_packages() if package.name == bench.client_id)
    examples: list[Example] = []
    for file in source_files(package):
        examples += _documented_functions(file)
        if len(examples) >= most:
            break
    return examples[:most]


def _documented_functions(file: Path) -> Iterator[Example]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's "\d"
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            prompt = f"def {node.name}({ast.unparse(node.args)})"
            yield Example(turns=(Turn("user", prompt), Turn("assistant", docstring)))


def make_workload(name: str, bench: Bench, examples: Sequence[Example]) -> Workload:
    """Return the rows a client draws in its first round, from an adapter as it is after some rounds."""
    training, tokenizer = bench.training, bench.engine.base.tokenizer
    encoded = [(example, encode(example, tokenizer, training.max_length)) for example in examples]
    usable = [(example, row) for example, row in encoded if row is not None]
    count = training.steps * training.batch_size
    drawn = draw_rows(len(usable), seed=bench.seed, client_id=bench.client_id, start=0, count=count)
    rows, size = [usable[index][1] for index in drawn], training.batch_size
    batches = tuple(tuple(rows[begin : begin + size]) for begin in range(0, count, size))
    layout = bench.engine.layout
    generator = torch.Generator().manual_seed(derive_seed(bench.seed, "bench-start"))
    start = initial_adapter(layout, bench.seed).vector + 0.01 * torch.randn(layout.size, generator=generator)
    job = Job(bench.client_id, start, batches, training)
    return Workload(name, tuple(usable[index][0] for index in drawn), job, layout)


def train_resident(bench: Bench, workload: Workload) -> Outcome:
    """Train as fedllm does: the base model and the rows' tokens are already there."""
    (result,) = bench.engine.train([workload.job])
    return Outcome(result.delta, {})


def train_afresh(bench: Bench, workload: Workload, scratch: Path, *, checkpointing: bool) -> Outcome:
    """Train as FlowerTune's ClientApp does for every message: nothing is kept from the last one."""
    phase, job, layout = Phases(), workload.job, workload.layout
    received = {spec.name: view for spec, view in layout.views(job.start)}
    with phase("load"), quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)
    with phase("wrap"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        modules = sorted({matrix.module.rpartition(".")[2] for matrix in layout.matrices})
        model = get_peft_model(model, _peft_config(layout, modules))
        set_peft_model_state_dict(model, received)
    with phase("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(bench.folder)
        rows = [encode(example, tokenizer, job.training.max_length) for example in workload.examples]
    with phase("trainer"):
        arguments = _arguments(job.training, scratch, checkpointing=checkpointing)
        data = [{"input_ids": list(row.tokens), "labels": list(row.labels)} for row in rows if row]
        collator = DataCollatorForSeq2Seq(tokenizer, padding="longest")
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
    with phase("train"):
        trainer.train()
    with phase("extract"):
        state = get_peft_model_state_dict(model)
        after = torch.cat([state[spec.name].reshape(-1) for spec in layout.tensors])
    return Outcome(after - job.start, phase.cpu)


def _peft_config(layout: AdapterLayout, modules: list[str]) -> LoraConfig:
    return LoraConfig(
        r=layout.rank,
        lora_alpha=layout.alpha,
        target_modules=modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def _arguments(training: LocalTraining, scratch: Path, *, checkpointing: bool) -> TrainingArguments:
    """Return the trainer's arguments: the engine's numbers, and nothing that logs, evaluates or saves."""
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip_norm,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
