"""A round's aggregation: time per matrix and per model, for 10 to 1,000 clients, compared with dense ones.

Three rules run through `strategies.aggregation.combine` on a few matrices of every shape of a model, from
updates that are already there: factor-mean, svd, and svd behind a geometric median. The anchor forms the mean
matrices sum p_i B_i A_i from the same factors in float64, which is where a dense server begins; its read-out
would come on top. A model's total is the sum over its matrices, so nothing of its size has to be held.

    python -m scripts.benchmarks aggregation --quick --json

Before anything is timed, every rule's reported change is compared with the dense one's. Clients share half of
their change and disagree in the other half.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.adapters.shapes import stack_factors
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import AggregationRule
from fedllm.runs.checkpoint import ServerState
from fedllm.seeds import derive_seed
from scripts.benchmarks.options import BenchOptions, start_benchmark
from scripts.benchmarks.timing import Measured, Timing, alternate, costs
from scripts.command_line import Seed
from scripts.reports import Goal, figures_table, publish
from strategies.aggregation import combine

PACKAGES = ("fedllm", "torch")
DENSE = "dense"
RULES = {
    "factor-mean": AggregationRule(read_out="factor-mean"),
    "svd": AggregationRule(),
    "svd by geometric median": AggregationRule(robust="geometric-median"),
}
MOST_HELD = 100  # clients of a rule that needs them all at once
CLIENTS = (10, 100, 1000)
MEASURED_ENTRIES = 2_500_000  # as many matrices of a shape are measured at once, at least one
QUICK_ENTRIES = 400_000_000  # --quick leaves out more entries times clients than that, of one matrix
TOLERANCE = 1e-5  # between the changes that a rule and the dense matrix report: both hold float32 factors
GOAL_RATIO = 1.0  # CPU seconds of the exact read-out over those of merely forming the matrix, 10 clients


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """What can be asked for."""

    seed: Seed = 0


@dataclass(frozen=True)
class Shape:
    """Matrices of one shape [num_out, num_in] in a model, and how many it has."""

    num_out: int
    num_in: int
    number: int


@dataclass(frozen=True)
class Model:
    """The adapted matrices of a model, at one rank."""

    rank: int
    shapes: tuple[Shape, ...]


MODELS = {
    "SmolLM2-135M, r=8": Model(
        8, (Shape(576, 576, 60), Shape(192, 576, 60), Shape(1536, 576, 60), Shape(576, 1536, 30))
    ),
    "7B (Mistral), r=16": Model(
        16, (Shape(4096, 4096, 64), Shape(1024, 4096, 64), Shape(14336, 4096, 64), Shape(4096, 14336, 32))
    ),
}


@dataclass(frozen=True, eq=False)
class Case:
    """Matrices of one shape and the updates of their clients."""

    start: AdapterState
    updates: tuple[ClientUpdate, ...]


def measured_matrices(shape: Shape) -> int:
    """Return how many matrices of a shape are measured at once, as a server batches them."""
    return max(1, min(shape.number, MEASURED_ENTRIES // (shape.num_out * shape.num_in)))


def make_case(shape: Shape, rank: int, num_clients: int, seed: int) -> Case:
    """Return clients of unequal weights that leave a trained adapter in partly the same direction."""
    number = measured_matrices(shape)
    matrices = (LoraMatrix(str(place), shape.num_in, shape.num_out) for place in range(number))
    layout = AdapterLayout(tuple(matrices), rank, 2.0 * rank, "f")
    generator = torch.Generator().manual_seed(derive_seed(seed, "bench-aggregation"))

    def noise() -> torch.Tensor:
        return 0.01 * torch.randn(layout.size, generator=generator)

    common, start = noise(), initial_adapter(layout, seed).vector + noise()
    updates = [
        ClientUpdate(
            client_id=f"c{index}",
            rank=rank,
            round_num=1,
            delta=common + noise(),
            weight=1.0 + index % 7,
            num_tokens=1,
            train_loss=1.0,
        )
        for index in range(num_clients)
    ]
    return Case(AdapterState(layout, start), tuple(updates))


def aggregate(case: Case, rule: AggregationRule) -> float:
    """Return the reported change of a round by one rule."""
    mixture = combine.RoundUpdates(rule, ServerState(0, case.start), trained="both", fresh=lambda: case.start)
    for update in case.updates:
        mixture = combine.add(mixture, update)
    return combine.finish(mixture).measured.delta_norm


def form_dense(case: Case, at_once: int = 64) -> torch.Tensor:
    """Return sum p_i B_i A_i [matrices, num_out, num_in] in float64, a stack of clients at a time."""
    layout, start = case.start.layout, case.start.vector
    matrix, indices = layout.matrices[0], tuple(range(len(layout.matrices)))
    weights = torch.tensor([update.weight for update in case.updates], dtype=torch.float64)
    weights /= weights.sum()
    mean = torch.zeros(len(indices), matrix.out_features, matrix.in_features, dtype=torch.float64)
    for begin in range(0, len(case.updates), at_once):
        adapters = [start + update.delta for update in case.updates[begin : begin + at_once]]
        a_LKRI, b_LOKR = stack_factors(layout, adapters, indices)
        b_LOKR *= weights[begin : begin + at_once, None]
        mean.baddbmm_(b_LOKR.flatten(2), a_LKRI.flatten(1, 2))
    return mean


def check(case: Case, rules: Mapping[str, AggregationRule]) -> None:
    """Compare what plain rules report with the dense matrices.

    Raises:
        RuntimeError: they differ by more than `TOLERANCE`.
    """
    layout = case.start.layout
    before = torch.stack([b_OR @ a_RI for a_RI, b_OR in layout.factors(case.start.vector.double())])
    change = layout.scale * float((form_dense(case) - before).norm())
    for name, rule in rules.items():
        if rule.robust == "none" and not math.isclose(aggregate(case, rule), change, rel_tol=TOLERANCE):
            raise RuntimeError(f"{name} reports another change than the dense matrices have")


def measure(shape: Shape, rank: int, num_clients: int, seed: int, repetitions: int) -> dict[str, Any]:
    """Return what every rule and the dense product cost for one matrix, over the repetitions."""
    case = make_case(shape, rank, num_clients, seed)
    rules = {name: rule for name, rule in RULES.items() if num_clients <= MOST_HELD or not rule.holds_updates}
    check(case, rules)  # the same work, and warm
    variants: dict[str, Callable[[], Any]] = {DENSE: partial(form_dense, case)}
    variants |= {name: partial(aggregate, case, rule) for name, rule in rules.items()}
    rounds: list[dict[str, Measured[Any]]] = list(alternate(variants, repetitions))
    number = measured_matrices(shape)
    timings = {
        name: [Timing(t.cpu / number, t.wall / number) for t in (one[name].timing for one in rounds)]
        for name in variants
    }
    return {name: costs(found, timings[DENSE]) for name, found in timings.items()}


def totals(model: Model, shapes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median CPU seconds of a whole model by rule, in the order of its shapes' figures."""
    return {
        name: sum(
            shape.number * found[name]["cpu_s"].median
            for shape, found in zip(model.shapes, shapes, strict=True)
        )
        for name in shapes[0]
    }


def figures_of(options: Options, console: Console) -> dict[str, Any]:
    """Measure every model for every number of clients; show each as it is there."""
    figures: dict[str, Any] = {}
    for name, model in MODELS.items():
        largest = max(shape.num_out * shape.num_in for shape in model.shapes)
        for num_clients in CLIENTS:
            if options.quick and largest * num_clients > QUICK_ENTRIES:
                continue
            found = [
                measure(shape, model.rank, num_clients, options.seed, options.repetitions)
                for shape in model.shapes
            ]
            keys = [f"{shape.num_out} x {shape.num_in}" for shape in model.shapes]
            one = {"matrices": dict(zip(keys, found, strict=True)), "total_cpu_s": totals(model, found)}
            figures.setdefault(name, {})[str(num_clients)] = one
            show(console, f"{name}, {num_clients} clients", model, one)
    return figures


def show(console: Console, title: str, model: Model, one: Mapping[str, Any]) -> None:
    """Print one table: median CPU milliseconds of a matrix, and seconds of the whole model."""
    columns = tuple(one["total_cpu_s"])
    rows = {
        f"{key}, {shape.number} times": [f"{1e3 * found[name]['cpu_s'].median:.2f}" for name in columns]
        for (key, found), shape in zip(one["matrices"].items(), model.shapes, strict=True)
    }
    rows["whole model, s"] = [f"{one['total_cpu_s'][name]:.2f}" for name in columns]
    console.print()
    console.print(figures_table(f"{title}: median CPU ms of one matrix", columns, rows))


def main(options: Options) -> None:
    """Measure, print and keep the figures."""
    console, machine = start_benchmark(options, PACKAGES)
    models = figures_of(options, console)
    settings = {"seed": options.seed, "repetitions": options.repetitions, "threads": options.threads}
    figures = {"environment": machine, "settings": settings, "models": models}
    first = next(iter(models.values()))["10"]["total_cpu_s"]
    goals = {"svd_vs_dense_10_clients": Goal(first["svd"] / first[DENSE], GOAL_RATIO, at_most=True)}
    publish(options, "bench_aggregation", figures, goals)
