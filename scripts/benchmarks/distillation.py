"""The distillation step compared with the training round before it, by number of teachers.

For K clients the round is `Engine.train` on their jobs; the step is `teach` on the rows of `Size`, then
`distil` for its steps. Both are smaller than the product's defaults: the step has 16 rows of 96 tokens and 4
steps of 4, where those are 64 texts of 128 tokens and 50 steps of 8. Both run on one resident base model, the
same rows for every K, alternated in one process. FLOP are counted: a teacher's pass is 2 per weight of the
trunk and of the head and token, a training pass as in `scripts.benchmarks.arithmetic.useful_flop`.

    python -m scripts.benchmarks distillation --quick --json

Peak memory is that of the step beyond what the process held before; what targets take is counted in bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console

from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.distillation.student import StudentTraining, distil
from fedllm.distillation.targets import Targets, target_bytes
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job
from fedllm.models.chat import Encoded
from fedllm.seeds import derive_seed
from scripts.benchmarks.arithmetic import trunk_weights, useful_flop
from scripts.benchmarks.memory import peak_memory
from scripts.benchmarks.models import TINY, bench_engine, plain_training, random_rows, vocabulary_of
from scripts.benchmarks.options import ModelOptions, start_benchmark
from scripts.benchmarks.timing import Timing, alternate
from scripts.charts import lines
from scripts.reports import Goal, figures_table, megabytes, publish, ratios, spread

PACKAGES = ("fedllm", "torch", "transformers")
TEACHERS = (1, 2, 4, 8)
LEARNT = 0.5  # share of a row's tokens that are predicted
TOP_K = 64
GOAL_ARITHMETIC = 1.5  # CPU seconds over FLOP of the step, both over the round's: no overhead of its own


@dataclass(frozen=True)
class Size:
    """What a client trains in a round and what a step distils on; tokens of every row."""

    rows_of_client: int = 8  # in steps of four
    texts: int = 16
    steps: int = 4
    batch_size: int = 4
    tokens: int = 96


QUICK = Size(rows_of_client=4, texts=4, steps=1, tokens=32)


@dataclass(frozen=True, eq=False)
class Bench:
    """An engine, the adapters of the largest ensemble, the jobs that make them and the step's rows."""

    engine: Engine
    start: AdapterState
    jobs: tuple[Job, ...]
    adapters: tuple[torch.Tensor, ...]
    texts: tuple[Encoded, ...]
    size: Size

    def round(self, number: int) -> None:
        """Train the first clients of a round."""
        list(self.engine.train(self.jobs[:number]))

    def step(self, number: int) -> Targets:
        """Teach the start what the first clients' adapters say together."""
        teacher = Teacher(self.adapters[:number], self.engine.layout, torch.ones(number))
        targets = teach(self.engine, teacher, self.texts, top_k=TOP_K, hindsight=True)
        size = self.size
        training = StudentTraining(size.steps, size.batch_size, 1e-4, 0)
        distil(self.engine, self.start, targets, training)
        return targets


def open_bench(name: str, device: str, targets: str, seed: int, size: Size) -> Bench:
    """Return the engine on a model and the work of both."""
    engine = bench_engine(name, device, targets)
    start, vocabulary = initial_adapter(engine.layout, seed), vocabulary_of(engine.base)
    number = max(TEACHERS)
    batches = size.rows_of_client // 4
    training = plain_training(batches, 4)
    lengths = (size.tokens,) * size.rows_of_client
    jobs = []
    for client in range(number):
        rows = random_rows(lengths, vocabulary, derive_seed(seed, "client", client), LEARNT)
        parts = tuple(rows[4 * index : 4 * index + 4] for index in range(batches))
        jobs.append(Job(f"c{client}", start.vector, parts, training))
    adapters = tuple(start.vector + result.delta for result in engine.train(jobs))
    texts = random_rows((size.tokens,) * size.texts, vocabulary, derive_seed(seed, "texts"), LEARNT)
    return Bench(engine, start, tuple(jobs), adapters, texts, size)


def round_flop(bench: Bench, number: int) -> float:
    """Return the arithmetic of the first clients' training."""
    rows = [row for job in bench.jobs[:number] for batch in job.batches for row in batch]
    return useful_flop(bench.engine.base.model, bench.engine.layout, rows)


def step_flop(bench: Bench, number: int) -> float:
    """Return the arithmetic of the step: teachers read every text, the student its batches."""
    model, size = bench.engine.base.model, bench.size
    config, tokens = model.config, sum(len(row.tokens) for row in bench.texts)
    weights = sum(weight.numel() for weight in trunk_weights(model).values()) + bench.engine.layout.size
    head = config.vocab_size * config.hidden_size * sum(row.num_supervised for row in bench.texts)
    attention = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    attention *= sum(len(row.tokens) ** 2 for row in bench.texts)
    taught = number * (2 * weights * tokens + 2 * head + attention)
    learnt = bench.texts[: size.batch_size] * size.steps  # all rows are of one length
    return float(taught + useful_flop(model, bench.engine.layout, learnt))


def measure(bench: Bench, repetitions: int) -> dict[str, Any]:
    """Return the figures of every number of teachers."""
    found = {}
    for number in TEACHERS:
        works: dict[str, Callable[[], Any]] = {
            "round": partial(bench.round, number),
            "step": partial(bench.step, number),
        }
        targets, peak = peak_memory(works["step"], bench.engine.base.device)
        timings: dict[str, list[Timing]] = {name: [] for name in works}
        for measured in alternate(works, repetitions):
            for name, one in measured.items():
                timings[name].append(one.timing)
        device = bench.engine.base.device
        seconds = {name: [one.busy(device) for one in each] for name, each in timings.items()}
        flop = {"round": round_flop(bench, number), "step": step_flop(bench, number)}
        ratio = ratios(seconds["step"], seconds["round"])
        found[str(number)] = {
            "round_s": spread(seconds["round"]),
            "step_s": spread(seconds["step"]),
            "step_over_round": ratio,
            "round_flop": flop["round"],
            "step_flop": flop["step"],
            "flop_step_over_round": flop["step"] / flop["round"],
            "seconds_over_flop": ratio.median / (flop["step"] / flop["round"]),
            "peak_bytes": peak,
            "adapter_bytes": 4 * number * bench.engine.layout.size,
            "target_bytes": target_bytes(len(targets.tail_N), TOP_K, number),
        }
    return found


def show(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Print the table of one model."""
    rows = {
        f"{number} teachers": [
            row["round_s"].text(),
            row["step_s"].text(),
            row["step_over_round"].text(),
            f"{row['flop_step_over_round']:.2f}",
            megabytes(row["peak_bytes"]),
            megabytes(row["adapter_bytes"]),
            f"{row['target_bytes'] / 1e6:.1f}",
        ]
        for number, row in figures.items()
    }
    columns = (
        "round, s",
        "step, s",
        "step / round",
        "FLOP, step / round",
        "peak MB",
        "adapters MB",
        "targets MB",
    )
    console.print("\n", figures_table(f"{name}: min, median and max over the repetitions", columns, rows))


def main(options: ModelOptions) -> None:
    """Measure, print and keep the figures."""
    console, machine = start_benchmark(options, PACKAGES)
    size = QUICK if options.quick else Size()
    repetitions = 1 if options.quick else options.repetitions
    models: dict[str, Any] = {}
    for name in dict.fromkeys((TINY, options.model)):
        bench = open_bench(name, options.device, options.targets, options.seed, size)
        bench.step(1)  # warm
        models[name] = measure(bench, repetitions)
        show(console, name, models[name])
    chosen = models[options.model]
    if options.plot:
        lines(
            options.plot,
            f"A distillation step compared with the round, {options.model}",
            "teachers",
            "seconds of the step over those of the round",
            {"step / round": [(int(number), row["step_over_round"]) for number, row in chosen.items()]},
        )
    worst = max(row["seconds_over_flop"] for row in chosen.values())
    goals = {"seconds_over_flop_of_step_over_round": Goal(worst, GOAL_ARITHMETIC, at_most=True)}
    settings = {
        "seed": options.seed,
        "repetitions": repetitions,
        "size": asdict(size),
        "targets": options.targets,
    }
    figures = {"environment": machine, "settings": settings, "models": models}
    publish(options, "bench_distillation", figures, goals)
