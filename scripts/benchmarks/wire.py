"""What an update weighs on the wire, what rounding it costs, and how fast it is packed.

Deltas are real: clients of the default source train LoRA adapters of the default model for a few and for many
local steps, on q_proj and v_proj and on every linear layer. Every payload of `fedllm.wire.packets` packs
them;
anchors are the same values as a safetensors file and as Flower's own `ArrayRecord` of named tensors, both
float32. Megabytes a second are those of the float32 values, so a smaller packet does not look slower.

    python -m scripts.benchmarks wire --quick --json

What rounding costs: the relative error of a client's delta (L2, and the largest), the error of the clients'
mean product B A over the size of its change, and the held-out loss of the clients' own adapters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import typer
from flwr.app import ArrayRecord, RecordDict
from rich.console import Console

from clients.process import Process
from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.wire import packets
from fedllm.wire.packets import packet_bytes
from scripts.benchmarks.deltas import Case, case_figures, packed, train_case, unpacked
from scripts.benchmarks.options import BenchOptions, Repetitions, start_benchmark
from scripts.benchmarks.timing import alternate
from scripts.charts import Plot, lines
from scripts.recipe_arguments import config_of
from scripts.reports import Goal, Spread, figures_table, publish, spread

PACKAGES = ("fedllm", "flwr", "torch", "transformers", "safetensors")
TARGETS = {"q, v": "q_proj,v_proj", "all linear": "all-linear"}
SAFETENSORS, ARRAY_RECORD = "safetensors", "Flower ArrayRecord"
MOST_TIMES = 50
GOAL_BYTES = {"bf16": 0.51, "int8": 0.27}  # of the float32 packet
GOAL_BF16_ERROR = 4e-3  # just above 2 ** -8, the most that rounding to bfloat16 moves a value


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """What can be asked for; --quick is few steps of single short rows."""

    repetitions: Repetitions = 5
    steps: Annotated[str, typer.Option(help="Local steps; with --quick the first number.")] = "5,50"
    clients: Annotated[int, typer.Option(min=1, help="Clients that train.")] = 4
    model: Annotated[str, typer.Option(help="The base model.")] = "smollm2-135m-instruct"
    source: Annotated[str, typer.Option(help="The clients' text.")] = "docstrings"
    plot: Plot = None


# --- bytes -------------------------------------------------------------------------------------------------


def sizes(start: AdapterState) -> dict[str, int]:
    """Return the exact bytes of an adapter: every payload's packet, and the two anchors."""
    sizes = {name: len(packed(start.vector, start.layout, name)) for name in packets.PAYLOADS}
    record = RecordDict({"arrays": ArrayRecord(start.tensors())})
    return {
        **sizes,
        SAFETENSORS: len(safetensors.torch.save(start.tensors())),
        ARRAY_RECORD: packet_bytes(record),
    }


# --- speed -------------------------------------------------------------------------------------------------


def speeds(case: Case, repetitions: int, num_bytes: float) -> dict[str, dict[str, Spread]]:
    """Return megabytes of float32 values packed and unpacked per CPU second.

    A repetition does `num_bytes` of them, but no more than MOST_TIMES adapters.
    """
    layout, delta = case.layout, case.deltas[0]
    tensors = AdapterState(layout, delta).tensors()
    packers: dict[str, Callable[[], Any]] = {
        **{name: partial(packed, delta, layout, name) for name in packets.PAYLOADS},
        SAFETENSORS: partial(safetensors.torch.save, tensors),
        ARRAY_RECORD: partial(ArrayRecord, tensors),
    }
    unpackers: dict[str, Callable[[], Any]] = {
        **{name: partial(unpacked, packers[name](), layout) for name in packets.PAYLOADS},
        SAFETENSORS: partial(safetensors.torch.load, packers[SAFETENSORS]()),
        ARRAY_RECORD: packers[ARRAY_RECORD]().to_torch_state_dict,
    }
    times = min(MOST_TIMES, math.ceil(num_bytes / (4 * layout.size)))
    megabytes = 4e-6 * layout.size * times

    def repeated(work: Callable[[], Any]) -> None:
        for _ in range(times):
            work()

    def measured(works: Mapping[str, Callable[[], Any]]) -> dict[str, Spread]:
        done = list(alternate({name: partial(repeated, work) for name, work in works.items()}, repetitions))
        return {name: spread([megabytes / one[name].timing.cpu for one in done]) for name in works}

    return {"pack": measured(packers), "unpack": measured(unpackers)}


# --- goals and what a person sees --------------------------------------------------------------------------


def goals_of(adapters: Mapping[str, Any], cases: Mapping[str, Any]) -> dict[str, Goal]:
    """Return the goals, each judged on its worst adapter or delta."""
    goals = {
        f"{payload}_bytes_vs_fp32": Goal(
            max(adapter["bytes"][payload] / adapter["bytes"]["fp32"] for adapter in adapters.values()),
            most,
            at_most=True,
        )
        for payload, most in GOAL_BYTES.items()
    }
    bf16 = max(case["payloads"]["bf16"]["relative_error"].max for case in cases.values())
    half_steps = max(case["int8_error_in_half_steps"].max for case in cases.values())
    return {
        **goals,
        "bf16_relative_error": Goal(bf16, GOAL_BF16_ERROR, at_most=True),
        "int8_error_in_half_steps": Goal(half_steps, 1.0, at_most=True),
    }


def show_adapter(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Print the bytes and speeds of one adapter."""
    number, anchor = figures["bytes"], figures["bytes"]["fp32"]
    console.print(f"\n{name}: {figures['values']:,} values in {figures['tensors']} tensors; down is fp32")
    rows = {
        form: [
            f"{size:,}",
            f"{size / anchor:.4f}",
            *(rate[form].text(0) for rate in figures["mb_per_cpu_s"].values()),
        ]
        for form, size in number.items()
    }
    columns = ("bytes", "of fp32", "packed MB / CPU s", "unpacked MB / CPU s")
    console.print(figures_table("min, median and max over the repetitions", columns, rows))


def show_case(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Print what rounding did to one case."""
    console.print(
        f"\n{name}: {figures['clients']} clients, |delta| {figures['delta_norm'].text(3)},"
        f" held-out loss {figures['held_out_loss_before']:.4f} before;"
        f" int8 errs by {figures['int8_error_in_half_steps'].max:.3f} half steps at most",
        soft_wrap=True,
    )
    rows = {
        payload: [
            " ".join(f"{value:.1e}" for value in (error.min, error.median, error.max)),
            f"{found['largest_error'].max:.1e}",
            f"{found['product_error']:.1e}",
            f"{found['held_out_loss']:.5f}",
        ]
        for payload, found in figures["payloads"].items()
        for error in (found["relative_error"],)
    }
    columns = ("relative error of a delta", "largest", "of the mean product", "held-out loss")
    console.print(figures_table("min, median and max over the clients", columns, rows))


def plot(path: Path, cases: Mapping[str, Any]) -> None:
    """Write the relative error of lossy payloads over local steps."""
    series: dict[str, list[tuple[float | str, Spread]]] = {}
    for name, case in cases.items():
        for payload in ("bf16", "int8"):
            error = case["payloads"][payload]["relative_error"]
            series.setdefault(f"{payload}, {name.rpartition(',')[0]}", []).append((case["steps"], error))
    lines(path, "Rounding a client's delta", "local steps", "relative error", series)


def config_for(options: Options) -> RunConfig:
    """Return the clients' text and training: the quickstart's, with --quick one short row a step."""
    config = config_of(["quickstart.toml"]).override(
        {
            "model.name": options.model,
            "model.device": options.device,
            "model.num-threads": options.threads,
            "data.source": options.source,
            "data.max-held-out": 2 if options.quick else 4,
            "federation.num-clients": options.clients,
        }
    )
    return config.override({"train.batch-size": 1, "train.max-length": 64}) if options.quick else config


def measure(
    config: RunConfig, steps: Sequence[int], repetitions: int, num_bytes: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures of every adapter and of every case."""
    adapters: dict[str, Any] = {}
    cases: dict[str, Any] = {}
    process = Process()  # reads the source once
    for name, targets in TARGETS.items():
        tuned = config.override({"lora.target-modules": targets})
        holder = process.open(tuned.to_flat(), {"server-paths": True})
        trained = [train_case(holder, number) for number in steps]
        start = trained[0].start
        adapters[name] = {
            "values": start.layout.size,
            "tensors": len(start.layout.tensors),
            "bytes": sizes(start),
            "mb_per_cpu_s": speeds(trained[-1], repetitions, num_bytes),
        }
        cases |= {f"{name}, {case.steps} steps": case_figures(case) for case in trained}
    return adapters, cases


def main(options: Options) -> None:
    """Measure, print and keep the figures."""
    console, machine = start_benchmark(options, PACKAGES)
    config = config_for(options)
    steps = [int(number) for number in options.steps.split(",")]
    steps = steps[:1] if options.quick else steps
    adapters, cases = measure(config, steps, options.repetitions, 2e7 if options.quick else 2e8)
    for name, adapter in adapters.items():
        show_adapter(console, name, adapter)
    for name, case in cases.items():
        show_case(console, name, case)
    if options.plot:
        plot(options.plot, cases)
    settings = {
        "seed": config.seed,
        "repetitions": options.repetitions,
        "batch_size": config.train.batch_size,
        "max_length": config.train.max_length,
        "learning_rate": config.train.learning_rate,
    }
    figures = {"environment": machine, "settings": settings, "adapters": adapters, "deltas": cases}
    goals = goals_of(adapters, cases)
    publish(options, "bench_wire", figures, goals)
