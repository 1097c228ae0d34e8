"""Real deltas of a few clients, and what a payload's rounding does to them, for `scripts.benchmarks.wire`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clients.data_holder import DataHolder
from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.models.chat import Encoded
from fedllm.wire import packets
from scripts.benchmarks.jobs import round_jobs
from scripts.reports import Spread, spread


@dataclass(frozen=True, eq=False)
class Case:
    """Deltas [P] of several clients after the same number of local steps from one start."""

    engine: Engine
    start: AdapterState
    steps: int
    deltas: tuple[torch.Tensor, ...]
    weights: tuple[float, ...]
    held_out: tuple[tuple[Encoded, ...], ...]

    @property
    def layout(self) -> AdapterLayout:
        """What the deltas' values are."""
        return self.start.layout


def train_case(holder: DataHolder, steps: int) -> Case:
    """Return the deltas of all clients of `holder` after `steps` local steps from the initial adapter."""
    jobs = round_jobs(holder, round_num=1, steps=steps)
    clients = [holder.clients[job.client_id] for job in jobs]
    return Case(
        engine=holder.engine,
        start=AdapterState(holder.engine.layout, jobs[0].start),
        steps=steps,
        deltas=tuple(result.delta for result in holder.engine.train(jobs)),
        weights=tuple(float(len(client.train)) for client in clients),
        held_out=tuple(client.held_out for client in clients),
    )


def packed(vector: torch.Tensor, layout: AdapterLayout, payload: str) -> bytes:
    """Return the packet that a client would send."""
    return packets.encode(vector, layout_digest=layout.digest, round_num=1, payload=payload)


def unpacked(packet: bytes, layout: AdapterLayout) -> torch.Tensor:
    """Return the vector [P] that the server would read."""
    return packets.decode(packet, layout_digest=layout.digest, size=layout.size, round_num=1)


def relative_error(exact: torch.Tensor, got: torch.Tensor) -> float:
    """Return ||got - exact|| / ||exact||."""
    return float((got - exact).norm() / exact.norm())


def largest_error(exact: torch.Tensor, got: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((got - exact).abs().max() / exact.abs().max())


def error_in_half_steps(exact: torch.Tensor, got: torch.Tensor) -> float:
    """Return the largest error over what int8 promises: half a step of the value's block.

    A step is the block's largest magnitude / 127, rounded up to the 8 significant bits of bfloat16.
    """
    padding = -exact.numel() % packets.INT8_BLOCK

    def largest(vector: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(vector, (0, padding))
        return padded.view(-1, packets.INT8_BLOCK).abs().amax(dim=1)

    half_steps = largest(exact) / 127 * (1 + 2.0**-7) / 2
    errors = largest(got - exact)
    return float((errors[half_steps > 0] / half_steps[half_steps > 0]).max())


def product_errors(case: Case, received: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, float]:
    """Return, per payload, ||M' - M|| / ||M - M_0|| over all matrices together, in float64.

    M is the clients' weighted mean of B A, M' that of the received deltas and M_0 the start's product.
    """
    layout, start = case.layout, case.start.vector
    total = sum(case.weights)
    shares = [weight / total for weight in case.weights]
    factors = {
        name: [layout.factors((start + delta).double()) for delta in deltas]
        for name, deltas in {"": case.deltas, **received}.items()
    }
    squared, change = dict.fromkeys(received, 0.0), 0.0
    for index, (a_RI, b_OR) in enumerate(layout.factors(start.double())):
        means = {
            name: sum(
                share * b @ a for share, (a, b) in zip(shares, (one[index] for one in all), strict=True)
            )
            for name, all in factors.items()
        }
        exact = torch.as_tensor(means.pop(""))
        change += float((exact - b_OR @ a_RI).square().sum())
        for name, mean in means.items():
            squared[name] += float((mean - exact).square().sum())
    return {name: math.sqrt(value / change) for name, value in squared.items()}


def held_out_loss(case: Case, deltas: Sequence[torch.Tensor]) -> float:
    """Return the mean over clients of each one's held-out loss under its own adapter, in nats per token."""
    jobs = [
        EvaluationJob(str(number), case.start.vector + delta, rows)
        for number, (delta, rows) in enumerate(zip(deltas, case.held_out, strict=True))
        if rows
    ]
    losses = [answer.loss for answer in case.engine.evaluate(jobs)]
    return sum(losses) / len(losses) if losses else math.nan


def case_figures(case: Case) -> dict[str, Any]:
    """Return what every payload does to the deltas of a case."""
    received = {
        payload: [unpacked(packed(delta, case.layout, payload), case.layout) for delta in case.deltas]
        for payload in packets.PAYLOADS
    }
    products = product_errors(case, received)

    def over_clients(error: Callable[[torch.Tensor, torch.Tensor], float], payload: str) -> Spread:
        return spread([error(*pair) for pair in zip(case.deltas, received[payload], strict=True)])

    return {
        "steps": case.steps,
        "clients": len(case.deltas),
        "delta_norm": spread([float(delta.norm()) for delta in case.deltas]),
        "held_out_loss_before": held_out_loss(case, [torch.zeros_like(case.start.vector)] * len(case.deltas)),
        "payloads": {
            payload: {
                "relative_error": over_clients(relative_error, payload),
                "largest_error": over_clients(largest_error, payload),
                "product_error": products[payload],
                "held_out_loss": held_out_loss(case, deltas),
            }
            for payload, deltas in received.items()
        },
        "int8_error_in_half_steps": over_clients(error_in_half_steps, "int8"),
    }
