"""Variants of the same training: their deltas must agree before anything is timed, and again every time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from scripts.benchmarks.memory import peak_memory
from scripts.benchmarks.timing import Timing, alternate
from scripts.reports import Spread, ratios, spread


@dataclass(frozen=True)
class Tolerance:
    """Two deltas agree if `share` of their values differ by at most `limit` of the largest movement.

    Not all values can: where a gradient is next to nothing AdamW still moves by the learning rate, in a
    direction that rounding decides.
    """

    share: float
    limit: float


# A learning rate off by 1 % would give 1e-2, another client's rows about 1. Steps after the first also carry
# what rounding did to the first: of padded against unpadded rows 99 of 100 values were within 1.3e-3 in
# float32 (1.4e-6 in float64). bfloat16 has two digits; there the test is whether the work was the same.
TOLERANCES = {
    torch.float32: Tolerance(0.95, 1e-3),
    torch.bfloat16: Tolerance(0.9, 5e-2),
}


@dataclass(frozen=True)
class Comparison:
    """What the variants cost: `timings[name][i]` is repetition i, `memory` the bytes at their peak."""

    device: torch.device
    timings: Mapping[str, Sequence[Timing]]
    memory: Mapping[str, int | None]
    difference: float  # the largest found between a variant's deltas and the first one's

    def seconds(self, name: str) -> list[float]:
        """Return the seconds that count (`Timing.busy`) of every repetition."""
        return [timing.busy(self.device) for timing in self.timings[name]]

    def ratio(self, name: str, reference: str) -> Spread:
        """Return the seconds of one variant over those of another, within repetitions."""
        return ratios(self.seconds(name), self.seconds(reference))

    def figures(self, name: str) -> dict[str, Spread | int | None]:
        """Return what one variant cost: both kinds of seconds, and memory."""
        timings = self.timings[name]
        return {
            "cpu_s": spread([timing.cpu for timing in timings]),
            "wall_s": spread([timing.wall for timing in timings]),
            "peak_bytes": self.memory[name],
        }


def compare(
    variants: Mapping[str, Callable[[], torch.Tensor]],
    device: torch.device,
    repetitions: int,
    tolerance: Tolerance,
    *,
    apart: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    between: Callable[[], object] = lambda: None,
) -> Comparison:
    """Compare variants that return deltas [C, P] of the same clients.

    What `apart` holds is timed with them though its deltas are others; `between` runs after every repetition.

    Raises:
        RuntimeError: a variant's deltas are not the first one's.
    """
    everyone = {**(apart or {}), **variants}
    memory, first = {}, {}
    for name, work in everyone.items():
        first[name], memory[name] = peak_memory(work, device)
    difference = checked_difference({name: first[name] for name in variants}, tolerance)
    first.clear()
    timings: dict[str, list[Timing]] = {name: [] for name in everyone}
    for outcomes in alternate(everyone, repetitions):
        found = checked_difference({name: outcomes[name].value for name in variants}, tolerance)
        difference = max(difference, found)
        for name, one in outcomes.items():
            timings[name].append(one.timing)
        between()
    return Comparison(device, timings, memory, difference)


def checked_difference(
    deltas: Mapping[str, torch.Tensor], tolerance: Tolerance, reference: str = ""
) -> float:
    """Return the largest difference of a variant's deltas, [C, P] or [P], from those of `reference`.

    Without a name the first variant is the reference.

    Raises:
        RuntimeError: it is above the tolerance, so the variants did not do the same work.
    """
    reference = reference or next(iter(deltas))
    others = [name for name in deltas if name != reference]
    found = {name: delta_difference(deltas[name], deltas[reference], tolerance.share) for name in others}
    for name, difference in found.items():
        if not difference <= tolerance.limit:  # NaN is refused too
            raise RuntimeError(f"{name} trained another adapter: {difference:.1e} away from {reference}'s")
    return max(found.values(), default=0.0)


def delta_difference(found_CP: torch.Tensor, expected_CP: torch.Tensor, share: float) -> float:
    """Return what `share` of a client's values differ by at most, over its largest movement: the worst's."""

    def rows(deltas: torch.Tensor) -> torch.Tensor:
        return deltas.reshape(-1, deltas.shape[-1])

    each = [
        torch.quantile((found - expected).abs() / expected.abs().max(), share)
        for found, expected in zip(rows(found_CP), rows(expected_CP), strict=True)
    ]
    return float(torch.stack(each).max())
