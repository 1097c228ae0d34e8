"""Which kernel computes the LoRA operator: on a GPU one that is right there, and fast for the model's shapes.

Tensor suffixes: T token, I input feature, O output feature.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from fedllm.adapters.layout import AdapterLayout, LoraMatrix
from fedllm.engine.adapter_bank import Bank, Kept, Kernel, make_route
from fedllm.engine.device_trial import stands_trial
from fedllm.engine.kernels import LoopKernel, MaskedKernel

NUM_CLIENTS, CLIENT_TOKENS = 8, 1024  # of the pass that kernels are timed on
TIMES = 4  # a GPU may be shared with other processes, which have their turns in between
PREFERRED = 1.5  # the Triton kernel is taken unless it takes this much longer, so that noise decides nothing
_ERRORS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # relative to the exact result


def choose_kernel(layout: AdapterLayout, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel for adapters of `layout` on a base model of `dtype`, found once a process.

    On a CPU it is `LoopKernel`, so that results keep their bits.
    """
    if device.type != "cuda":
        return LoopKernel()
    shapes = sorted({(matrix.in_features, matrix.out_features) for matrix in layout.matrices})
    return _chosen(tuple(shapes), layout.rank, device, dtype)


@lru_cache(maxsize=16)
def _chosen(
    shapes: tuple[tuple[int, int], ...], rank: int, device: torch.device, dtype: torch.dtype
) -> Kernel:
    if dtype not in _ERRORS or not stands_trial(device, "LoRA", partial(_is_right, rank, device, dtype)):
        return MaskedKernel()

    def seconds(kernel: Kernel) -> float:
        return sum(_seconds(kernel, shape, rank, device, dtype) for shape in shapes)

    return preferred(seconds)


def preferred(seconds: Callable[[Kernel], float]) -> Kernel:
    """Return the kernel for a GPU by the seconds that each takes, where memory allows to find out."""
    from fedllm.engine.triton.lora import TritonKernel

    ours, other = TritonKernel(), MaskedKernel()
    try:
        return other if seconds(ours) > PREFERRED * seconds(other) else ours
    except torch.OutOfMemoryError:
        return ours  # it needs less memory than the other


def _is_right(rank: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the Triton kernel agrees with the loop in float64, on three matrices of odd sizes."""
    from fedllm.engine.triton.lora import TritonKernel

    layout = _layout([(80, 72), (80, 8), (80, 130)], rank)
    layout, lengths, x_TI, g_TO = _given(layout, (70, 1, 130), device, dtype)
    found = _Pass(TritonKernel(), layout, lengths, x_TI, g_TO).run()
    exact = _Pass(LoopKernel(), layout, lengths, x_TI.double(), g_TO.double()).run()
    pairs = zip(found, exact, strict=True)
    return all(float((ours - theirs).norm() / theirs.norm()) < _ERRORS[dtype] for ours, theirs in pairs)


def _seconds(
    kernel: Kernel, shape: tuple[int, int], rank: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the least seconds of a GPU for some passes over one matrix, launches not counted."""
    given = _given(_layout([shape], rank), (CLIENT_TOKENS,) * NUM_CLIENTS, device, dtype)
    timed, busy = _Pass(kernel, *given), torch.zeros(4096, 4096, device=device, dtype=dtype)
    new_event: Any = torch.cuda.Event
    begin, end = (new_event(enable_timing=True) for _ in range(2))
    timed.run()
    found = []
    for _ in range(TIMES):
        for _ in range(30):  # the launches below are queued meanwhile
            torch.mm(busy, busy)
        begin.record()
        for _ in range(5):
            timed.run()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) / 1000)
    return min(found)


def _layout(shapes: Sequence[tuple[int, int]], rank: int) -> AdapterLayout:
    matrices = [LoraMatrix(str(number), *shape) for number, shape in enumerate(shapes)]
    return AdapterLayout(tuple(matrices), rank, 1.0, "")


def _given(
    layout: AdapterLayout, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[AdapterLayout, tuple[int, ...], torch.Tensor, torch.Tensor]:
    """Return what a `_Pass` is made of besides its kernel: random inputs and gradients."""
    draw = torch.Generator(device).manual_seed(0)
    widths = layout.matrices[0].in_features, sum(matrix.out_features for matrix in layout.matrices)
    x_TI, g_TO = (
        torch.randn(sum(lengths), width, generator=draw, device=device).to(dtype) for width in widths
    )
    return layout, lengths, x_TI, g_TO


class _Pass:
    """A pass of one group of matrices, with a client, and a slot, for each length."""

    def __init__(
        self,
        kernel: Kernel,
        layout: AdapterLayout,
        lengths: tuple[int, ...],
        x_TI: torch.Tensor,
        g_TO: torch.Tensor,
    ):
        dtype = torch.float64 if x_TI.dtype == torch.float64 else torch.float32
        draw = torch.Generator().manual_seed(0)
        vectors = [torch.randn(layout.size, generator=draw) for _ in lengths]
        rows = range(len(lengths))
        self.bank = Bank(layout, kernel, x_TI.device, dtype)
        self.bank.load(layout, vectors, [0.5 + row for row in rows])
        self.bank.reserve(len(lengths))
        self.bank.route = make_route(lengths, rows, rows, len(lengths), x_TI.device)
        self.x_TI, self.g_TO = x_TI, g_TO

    def run(self) -> tuple[torch.Tensor, ...]:
        """Return (y, dx, the bank's gradients) of one pass forward and back."""
        bank, group = self.bank, tuple(range(len(self.bank.layout.matrices)))
        y_TO, dx_TI = torch.zeros_like(self.g_TO), torch.zeros_like(self.x_TI)
        z_TM = bank.kernel.forward(bank, group, self.x_TI, y_TO)
        bank.kernel.backward(bank, group, Kept(self.x_TI, z_TM), self.g_TO, dx_TI)
        return y_TO, dx_TI, bank.grad_SP
