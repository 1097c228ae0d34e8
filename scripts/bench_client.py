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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
    Spread,
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
TOLERANCE = 1e-3  # of |delta - delta'| / |delta| in float32; a learning rate off by 1 % would give 1e-2
PEAK_TOKENS = 1024  # rows of the peak GEMM: more of them change little
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


def full_rows(bench: Bench) -> list[Example]:
    """Return docstrings as plain text longer than a row: nothing is padded and every token is learnt.

    What is left of the difference is the base model kept resident and the forward pass not repeated.
    """
    tokenizer, most = bench.engine.base.tokenizer, bench.training.max_length
    texts = (example.turns[-1].content for example in whole_docstrings(bench, 4000))
    return [Example(text=text) for text in texts if len(tokenizer(text)["input_ids"]) >= most]


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


def useful_flop(bench: Bench, workload: Workload) -> float:
    """Return the arithmetic of training on these rows without a padded, repeated or unlearnt prediction.

    Per token 2 FLOP per trunk weight forward, 2 per weight above the lowest adapter backward (a frozen weight
    has no gradient) and 6 per adapter value; 4 per head weight and learnt token; causal attention.
    """
    config, lengths = bench.engine.base.model.config, workload.lengths
    linears = target_modules(bench.engine.base.model, "all-linear")
    sizes = {name: module.weight.numel() for name, module in linears.items()}
    lowest = list(sizes).index(workload.layout.matrices[0].module)
    above = sum(list(sizes.values())[lowest + 1 :])
    per_token = 2 * sum(sizes.values()) + 2 * above + 6 * workload.layout.size
    head = 4 * config.vocab_size * config.hidden_size * workload.num_supervised
    width = config.num_attention_heads * config.head_dim
    attention = 6 * config.num_hidden_layers * width * sum(length**2 for length in lengths)
    return float(per_token * sum(lengths) + head + attention)


@contextmanager
def quiet_huggingface() -> Iterator[None]:
    """Silence two names that transformers deprecates and its own trainer and PEFT still use."""
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
        NO_CHECKPOINTING: partial(afresh, checkpointing=False),
    }


def largest_difference(outcomes: Mapping[str, Measured[Outcome]]) -> float:
    """Return the largest |delta - ours| / |ours|.

    Raises:
        RuntimeError: it is above the tolerance, so the clients did not do the same work.
    """
    ours = outcomes[OURS].value.delta
    differences = {
        name: float((outcome.value.delta - ours).norm() / ours.norm()) for name, outcome in outcomes.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE:
        raise RuntimeError(f"{worst!r} trained another adapter: {differences[worst]:.1e} from {OURS}'s")
    return differences[worst]


def shortened(workload: Workload, steps: int) -> Workload:
    """Return the first steps of a workload."""
    job = replace(
        workload.job,
        batches=workload.job.batches[:steps],
        training=replace(workload.job.training, steps=steps),
    )
    return replace(workload, examples=workload.examples[: steps * job.training.batch_size], job=job)


def measure(bench: Bench, workload: Workload, repetitions: int, scratch: Path) -> dict[str, Any]:
    """Compare the clients on one workload; the JSON-ready figures."""
    brief = variants(bench, shortened(workload, 2), scratch)
    largest_difference({name: timed(work) for name, work in brief.items()})  # the same work, and warm
    weights = [module.weight for module in target_modules(bench.engine.base.model, "all-linear").values()]
    rounds, peaks, differences = [], [], []
    for outcomes in alternate(variants(bench, workload, scratch), repetitions):
        differences.append(largest_difference(outcomes))
        rounds.append(outcomes)
        peaks.append(gemm_rate(weights, PEAK_TOKENS))
    return {
        "rows": describe_rows(workload),
        "relative_difference": max(differences),
        "useful_gflop": useful_flop(bench, workload) / 1e9,
        "peak_gflop_per_cpu_s": asdict(spread([peak / 1e9 for peak in peaks])),
        "clients": {name: client_figures(bench, workload, rounds, peaks, name) for name in rounds[0]},
        "cpu_ratio": {name: asdict(_cpu_ratio(rounds, name)) for name in rounds[0] if name != OURS},
    }


def describe_rows(workload: Workload) -> dict[str, Any]:
    """Return how long the rows are and how much of them is learnt or padded."""
    tokens = sum(workload.lengths)
    return {
        "lengths": workload.lengths,
        "tokens": tokens,
        "learnt_share": workload.num_supervised / tokens,
        "padded_slots_per_token": workload.num_padded / tokens,
    }


def client_figures(
    bench: Bench,
    workload: Workload,
    rounds: Sequence[Mapping[str, Measured[Outcome]]],
    peaks: Sequence[float],
    name: str,
) -> dict[str, Any]:
    """Return what one client cost over the repetitions."""
    timings = [outcomes[name].timing for outcomes in rounds]
    tokens, useful = sum(workload.lengths), useful_flop(bench, workload)
    limits = [useful / peak for peak in peaks]  # CPU seconds of the arithmetic alone
    phases = [outcomes[name].value.phases for outcomes in rounds]
    return {
        "cpu_s": asdict(spread([timing.cpu for timing in timings])),
        "wall_s": asdict(spread([timing.wall for timing in timings])),
        "tokens_per_cpu_s": asdict(spread([tokens / timing.cpu for timing in timings])),
        "share_of_limit": asdict(ratios(limits, [timing.cpu for timing in timings])),
        "phases_cpu_s": {key: asdict(spread([one[key] for one in phases])) for key in phases[0]},
    }


def _cpu_ratio(rounds: Sequence[Mapping[str, Measured[Outcome]]], name: str) -> Spread:
    return ratios([r[name].timing.cpu for r in rounds], [r[OURS].timing.cpu for r in rounds])


def show(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Print one workload's tables."""
    rows = figures["rows"]
    console.print(
        f"\n{name}: 16 rows of {min(rows['lengths'])} to {max(rows['lengths'])} tokens, {rows['tokens']} in all,"
        f" {rows['learnt_share']:.0%} learnt, {rows['padded_slots_per_token']:.2f} slots per token if padded;"
        f" deltas differ by {figures['relative_difference']:.0e} (relative, float32)"
    )
    cells = {}
    for client, cost in figures["clients"].items():
        ratio = figures["cpu_ratio"].get(client)
        cells[client] = [
            *(Spread(**cost[key]).text() for key in ("cpu_s", "wall_s")),
            Spread(**cost["tokens_per_cpu_s"]).text(0),
            Spread(**cost["share_of_limit"]).text(),
            Spread(**ratio).text() if ratio else "1",
        ]
    columns = ("CPU s", "wall s", "tokens / CPU s", "share of limit", "CPU s over fedllm's")
    console.print(figures_table("min / median / max over repetitions", columns, cells))
    names = [AFRESH, NO_CHECKPOINTING]
    phases = {client: figures["clients"][client]["phases_cpu_s"] for client in names}
    medians = {client: [f"{part['median']:.3f}" for part in phases[client].values()] for client in names}
    console.print(figures_table("CPU s per phase, median", tuple(phases[AFRESH]), medians))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="One client round of fedllm beside FlowerTune's kind of client."
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 repetitions on the default rows; under 3 minutes"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="per workload (default: 3)")
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
    bench, config = open_bench(options)
    sources = {"first sentences": first_sentences(bench, config)}
    if not options.quick:
        sources["whole docstrings"] = whole_docstrings(bench)
        sources["full rows, all learnt"] = full_rows(bench)
    repetitions = 2 if options.quick else options.repetitions
    workloads: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, quiet_huggingface():
        for name, examples in sources.items():
            workload = make_workload(name, bench, examples)
            workloads[name] = measure(bench, workload, repetitions, Path(scratch))
            show(console, name, workloads[name])
    ratio = workloads["first sentences"]["cpu_ratio"][AFRESH]["median"]
    goals = {"cpu_ratio_vs_flowertune": Goal(ratio, GOAL_RATIO)}
    settings = {"seed": options.seed, "client": options.client, "repetitions": repetitions}
    figures = {"environment": machine, "settings": settings, "workloads": workloads}
    emit(report("bench_client", figures, goals), as_json=options.json, output=options.output)


if __name__ == "__main__":
    main()
