"""One client round: fedllm's engine beside a client that starts afresh, as FlowerTune's does.

FlowerTune's ClientApp (adap/flower, examples/flowertune-llm) answers every message by loading the base model,
wrapping it with PEFT, loading the tokenizer and building a trainer, and it trains with gradient checkpointing
on padded batches. `train_afresh` does the same on current libraries; `Engine.train` finds the base model and
the rows' tokens resident. Both get the same start, rows, order, label masks and AdamW, and must give the same
adapter before anything is timed, and again every time.

    python -m scripts.bench_client --quick --json

What is left easy for the other side: it tokenises only the rows it trains on (FlowerTune: its whole
partition), reads the base model from a warm page cache without quantising it, and its trainer logs and saves
nothing. The wire is left out on both sides. Dropout is 0 on both, so that results can be compared; FlowerTune
trains with 0.075.
"""

import argparse
import ast
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a look-up would be timed

import peft
import torch
import transformers
from rich.console import Console

from clients.holder import hosted_rows
from fedllm.adapters.layout import AdapterLayout, initial_adapter
from fedllm.config import LoraConfig, ModelConfig, RunConfig
from fedllm.data.example import Example, Turn
from fedllm.data.packages import installed_packages, source_files
from fedllm.data.shards import draw_rows
from fedllm.errors import DataError
from fedllm.models.base import layout_of, load_base
from fedllm.models.chat import Encoded, encode
from fedllm.models.files import quiet_transformers
from fedllm.seeds import derive_seed
from fedllm.training.engine import Engine
from fedllm.training.jobs import Job
from fedllm.types import LocalTraining
from scripts.bench_tools import (
    Goal,
    Measured,
    Phases,
    Spread,
    alternate,
    costs,
    emit,
    environment,
    figures_table,
    gemm_rate,
    report,
    spread,
    spreads_table,
    timed,
    trunk_weights,
    useful_flop,
)

OURS, AFRESH, NO_CHECKPOINTS = "fedllm", "FlowerTune-like", "no checkpointing"
PACKAGES = ("fedllm", "torch", "transformers", "peft", "accelerate", "safetensors")
# 99 of 100 values of two deltas differ by less than this share of the largest movement; a learning rate
# off by 1 % would give 1e-2. Not all values can: where a gradient is next to nothing AdamW still moves by
# the learning rate, in a direction that the rounding of float32 decides.
TOLERANCE = 1e-3
PEAK_TOKENS = 512  # rows of the peak GEMM: more of them change little
GOAL_RATIO = 1.5

LORA = LoraConfig(rank=8, alpha=16.0, target_modules="q_proj,v_proj")
MAX_LENGTH = 128  # tokens of a row
TRAINING = LocalTraining(steps=4, batch_size=4, learning_rate=1e-3, weight_decay=0.0, clip_norm=1.0)


@dataclass(frozen=True, eq=False)
class Workload:
    """One client's work in a round, as text and as the engine's job."""

    examples: tuple[Example, ...]
    job: Job
    layout: AdapterLayout

    @property
    def rows(self) -> list[Encoded]:
        """The examples as tokens, in the order they are trained on."""
        return [row for batch in self.job.batches for row in batch]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def num_learnt(self) -> int:
        """Tokens whose prediction is learnt."""
        return sum(row.num_supervised for row in self.rows)

    @property
    def num_slots(self) -> int:
        """Tokens of all rows where every batch is padded to its longest."""
        return sum(len(batch) * max(len(row.tokens) for row in batch) for batch in self.job.batches)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The delta [P] a client sends, and the CPU seconds of the phases it names."""

    delta: torch.Tensor
    phases: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Bench:
    """What every client shares: the resident engine, where the base model lies, and the round's numbers."""

    engine: Engine
    folder: Path
    client_id: str
    seed: int

    @property
    def model(self) -> Any:
        """The resident base model."""
        return self.engine.base.model


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the clients cost on one workload: `clients[name][i]` is repetition i."""

    workload: Workload
    useful_flop: float
    peak: float  # FLOP per CPU second of the fastest GEMM pass
    difference: float  # the largest between two clients' deltas, as TOLERANCE measures it
    clients: Mapping[str, Sequence[Measured[Outcome]]]


def open_bench(client_id: str, seed: int) -> Bench:
    """Load the base model and build the engine, once, as a client process does."""
    base = load_base(ModelConfig(name="smollm2-135m-instruct", device="cpu"))
    engine = Engine(base, layout_of(base.model, LORA, base.fingerprint))
    return Bench(engine, base.files.folder, client_id, seed)


# Three kinds of rows, from the most to the least that can be left out of their training.


def first_sentences(bench: Bench) -> list[Example]:
    """Return the client's rows of fedllm's default source: a signature, a docstring's first sentence.

    Raises:
        DataError: the source has no such client.
    """
    config = RunConfig(seed=bench.seed)
    clients = {rows.client_id: rows.train for rows in hosted_rows(config, {})}
    if bench.client_id not in clients:
        raise DataError(f"--client {bench.client_id}: expected one of {', '.join(sorted(clients))}")
    return list(clients[bench.client_id])


def whole_docstrings(bench: Bench, most: int = 400) -> list[Example]:
    """Return rows of the same package whose answers are whole docstrings: longer, and more of them learnt."""
    package = next(package for package in installed_packages() if package.name == bench.client_id)
    examples: list[Example] = []
    for file in source_files(package):
        examples += _documented_functions(file)
        if len(examples) >= most:
            break
    return examples[:most]


def full_rows(bench: Bench) -> list[Example]:
    """Return docstrings as plain text, longer than a row: nothing to pad, every token learnt.

    What is left of the difference is the base model kept and the forward pass not repeated.
    """
    tokenizer, most = bench.engine.base.tokenizer, MAX_LENGTH
    texts = (example.turns[-1].content for example in whole_docstrings(bench, 4000))
    return [Example(text=text) for text in texts if len(tokenizer(text)["input_ids"]) >= most]


def _documented_functions(file: Path) -> Iterator[Example]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's "\d"
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # a template, or another version's Python
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            prompt = f"def {node.name}({ast.unparse(node.args)})"
            yield Example(turns=(Turn("user", prompt), Turn("assistant", docstring)))


def make_workload(bench: Bench, examples: Sequence[Example]) -> Workload:
    """Return the rows a client draws in its first round, from an adapter as it is after some rounds."""
    tokenizer, layout = bench.engine.base.tokenizer, bench.engine.layout
    encoded = [(example, encode(example, tokenizer, MAX_LENGTH)) for example in examples]
    usable = [(example, row) for example, row in encoded if row is not None]
    count, size = TRAINING.steps * TRAINING.batch_size, TRAINING.batch_size
    drawn = draw_rows(len(usable), seed=bench.seed, client_id=bench.client_id, start=0, count=count)
    rows = [usable[index][1] for index in drawn]
    batches = tuple(tuple(rows[begin : begin + size]) for begin in range(0, count, size))
    generator = torch.Generator().manual_seed(derive_seed(bench.seed, "bench-start"))
    start = initial_adapter(layout, bench.seed).vector + 0.01 * torch.randn(layout.size, generator=generator)
    job = Job(bench.client_id, start, batches, TRAINING)
    return Workload(tuple(usable[index][0] for index in drawn), job, layout)


def shortened(workload: Workload, steps: int) -> Workload:
    """Return the first steps of a workload."""
    job = workload.job
    training = replace(job.training, steps=steps)
    brief = replace(job, batches=job.batches[:steps], training=training)
    return replace(workload, examples=workload.examples[: steps * training.batch_size], job=brief)


def train_resident(bench: Bench, workload: Workload) -> Outcome:
    """Train as fedllm does: the base model and the rows' tokens are already there."""
    (result,) = bench.engine.train([workload.job])
    return Outcome(result.delta, {})


def train_afresh(bench: Bench, workload: Workload, scratch: Path, *, checkpointing: bool) -> Outcome:
    """Train as FlowerTune's ClientApp does for every message: nothing is kept from the last one."""
    phase, job, layout = Phases(), workload.job, workload.layout
    received = {spec.name: view for spec, view in layout.views(job.start)}
    with phase("load"), quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)
    with phase("wrap"):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        model = peft.get_peft_model(model, peft_config(layout))
        peft.set_peft_model_state_dict(model, received)
    with phase("tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(bench.folder)
        rows = [encode(example, tokenizer, MAX_LENGTH) for example in workload.examples]
    with phase("trainer"):
        arguments = trainer_arguments(job.training, scratch, checkpointing=checkpointing)
        data = [{"input_ids": list(row.tokens), "labels": list(row.labels)} for row in rows if row]
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding="longest")
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=collator
        )
        trainer.remove_callback(transformers.PrinterCallback)
    with phase("train"):
        trainer.train()
    with phase("extract"):
        state = peft.get_peft_model_state_dict(model)
        after = torch.cat([state[spec.name].reshape(-1) for spec in layout.tensors])
    return Outcome(after - job.start, phase.cpu)


def peft_config(layout: AdapterLayout) -> peft.LoraConfig:
    """Return PEFT's form of a layout."""
    modules = sorted({matrix.module.rpartition(".")[2] for matrix in layout.matrices})
    alpha: Any = layout.alpha  # PEFT declares an int and computes with any number
    return peft.LoraConfig(
        r=layout.rank, lora_alpha=alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def trainer_arguments(
    training: LocalTraining, scratch: Path, *, checkpointing: bool
) -> transformers.TrainingArguments:
    """Return the trainer's arguments: the engine's numbers, and nothing that logs, evaluates or saves."""
    return transformers.TrainingArguments(
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


@contextmanager
def quiet_huggingface() -> Iterator[None]:
    """Silence two names that transformers deprecates while PEFT and every trainer script still use them."""
    with warnings.catch_warnings():
        for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
            warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
        yield


def variants(bench: Bench, workload: Workload, scratch: Path) -> dict[str, Callable[[], Outcome]]:
    """Return the clients that are compared, by name."""
    afresh = partial(train_afresh, bench, workload, scratch)
    return {
        OURS: partial(train_resident, bench, workload),
        AFRESH: partial(afresh, checkpointing=True),
        NO_CHECKPOINTS: partial(afresh, checkpointing=False),
    }


def checked_difference(outcomes: Mapping[str, Measured[Outcome]]) -> float:
    """Return the largest difference between a client's delta and ours, as `TOLERANCE` measures it.

    Raises:
        RuntimeError: it is above the tolerance, so the clients did not do the same work.
    """
    ours = outcomes[OURS].value.delta
    found = {name: _difference(one.value.delta, ours) for name, one in outcomes.items()}
    for name, difference in found.items():
        if not difference <= TOLERANCE:  # NaN is refused too
            raise RuntimeError(f"{name} trained another adapter: {difference:.1e} away from {OURS}'s")
    return max(found.values())


def _difference(delta: torch.Tensor, ours: torch.Tensor) -> float:
    return float(torch.quantile((delta - ours).abs() / ours.abs().max(), 0.99))


def measure(bench: Bench, workload: Workload, repetitions: int, scratch: Path) -> Comparison:
    """Compare the clients on one workload.

    Raises:
        RuntimeError: they did not train the same adapter.
    """
    brief = variants(bench, shortened(workload, 1), scratch)
    checked_difference({name: timed(work) for name, work in brief.items()})  # the same work, and warm
    weights = list(trunk_weights(bench.model).values())
    rounds, peaks, differences = [], [], []
    for outcomes in alternate(variants(bench, workload, scratch), repetitions):
        differences.append(checked_difference(outcomes))
        rounds.append(outcomes)
        peaks += [gemm_rate(weights, PEAK_TOKENS) for _ in range(2)]
    return Comparison(
        workload,
        useful_flop(bench.model, workload.layout, workload.rows),
        max(peaks),
        max(differences),
        {name: [outcomes[name] for outcomes in rounds] for name in rounds[0]},
    )


def client_figures(comparison: Comparison, name: str) -> dict[str, Spread]:
    """Return what one client cost over the repetitions."""
    timings = [one.timing for one in comparison.clients[name]]
    least_cpu = comparison.useful_flop / comparison.peak  # of the arithmetic alone
    return {
        **costs(timings, [one.timing for one in comparison.clients[OURS]]),
        "tokens_per_cpu_s": spread([comparison.workload.num_tokens / timing.cpu for timing in timings]),
        "share_of_limit": spread([least_cpu / timing.cpu for timing in timings]),
    }


def phase_figures(comparison: Comparison, name: str) -> dict[str, Spread]:
    """Return the CPU seconds of one client's phases over the repetitions."""
    phases = [one.value.phases for one in comparison.clients[name]]
    return {key: spread([one[key] for one in phases]) for key in phases[0]}


def comparison_figures(comparison: Comparison) -> dict[str, Any]:
    """Return everything one workload's comparison found, as the report keeps it."""
    workload, names = comparison.workload, tuple(comparison.clients)
    return {
        "lengths": [len(row.tokens) for row in workload.rows],
        "tokens": workload.num_tokens,
        "learnt_share": workload.num_learnt / workload.num_tokens,
        "padded_slots_per_token": workload.num_slots / workload.num_tokens,
        "delta_difference": comparison.difference,
        "useful_gflop": comparison.useful_flop / 1e9,
        "peak_gflop_per_cpu_s": comparison.peak / 1e9,
        "clients": {name: client_figures(comparison, name) for name in names},
        "phases_cpu_s": {name: phase_figures(comparison, name) for name in names[1:]},
    }


def show(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Print one workload's tables."""
    lengths, phases = figures["lengths"], figures["phases_cpu_s"]
    console.print(
        f"\n{name}: {len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, {figures['tokens']} in"
        f" all, {figures['learnt_share']:.0%} learnt, {figures['padded_slots_per_token']:.2f} slots per token"
        f" where padded; deltas agree to {figures['delta_difference']:.0e}",
        soft_wrap=True,
    )
    digits = {"cpu_s": 2, "wall_s": 2, "cpu_ratio": 2, "tokens_per_cpu_s": 0, "share_of_limit": 2}
    console.print(spreads_table(figures["clients"], digits))
    medians = {client: [f"{part.median:.3f}" for part in parts.values()] for client, parts in phases.items()}
    console.print(figures_table("median CPU s of each phase", tuple(phases[AFRESH]), medians))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="A client round of fedllm beside one of FlowerTune's kind.")
    parser.add_argument("--quick", action="store_true", help="the default rows, twice; under 3 minutes")
    parser.add_argument("--repetitions", type=int, default=3, help="per kind of rows (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and the start (default: 0)")
    parser.add_argument("--client", default="transformers", help="the package whose rows are trained on")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("--output", type=Path, help="also keep the JSON object in this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep the figures."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json, highlight=False)
    machine = environment(PACKAGES)
    bench = open_bench(options.client, options.seed)
    sources = {"first sentences": first_sentences(bench)}
    if not options.quick:
        sources |= {"whole docstrings": whole_docstrings(bench), "full rows": full_rows(bench)}
    repetitions = 2 if options.quick else options.repetitions
    workloads: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, quiet_huggingface():
        for name, examples in sources.items():
            compared = measure(bench, make_workload(bench, examples), repetitions, Path(scratch))
            workloads[name] = comparison_figures(compared)
            show(console, name, workloads[name])
    ratio = workloads["first sentences"]["clients"][AFRESH]["cpu_ratio"].median
    settings = {
        "seed": options.seed,
        "client": options.client,
        "repetitions": repetitions,
        "token_budget": bench.engine.token_budget,  # measured on this machine, so it may differ elsewhere
    }
    figures = {"environment": machine, "settings": settings, "rows": workloads}
    goals = {"cpu_ratio_vs_flowertune": Goal(ratio, GOAL_RATIO)}
    emit(report("bench_client", figures, goals), as_json=options.json, output=options.output)


if __name__ == "__main__":
    main()
