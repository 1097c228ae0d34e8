"""The LoRA operator in Triton against the loop over clients in float64."""

from collections.abc import Iterator

import pytest
import torch

from fedllm.adapters.layout import AdapterLayout, LoraMatrix
from fedllm.engine.adapter_bank import Bank, Kept, Kernel, make_route
from fedllm.engine.kernels import LoopKernel

Outcome = tuple[torch.Tensor, ...]  # y, dx, z, gradients


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill new memory with NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def outcome(
    kernel: Kernel,
    rank: int,
    outputs: tuple[int, ...],
    route: tuple[list[int], list[int], list[int]],
    *,
    dtype: torch.dtype = torch.float32,
    trained: str = "both",
    device: torch.device,
    g_TO: torch.Tensor | None = None,
) -> Outcome:
    """Return what a kernel makes of random numbers; the loop gets the same ones in float64."""
    is_twin = isinstance(kernel, LoopKernel)
    if is_twin:  # cuBLAS refuses to multiply while memory is poisoned
        device = torch.device("cpu")
    draw = torch.Generator().manual_seed(0)
    width, (lengths, clients, slots) = 20, route
    matrices = [LoraMatrix(str(number), width, size) for number, size in enumerate(outputs)]
    layout = AdapterLayout(tuple(matrices), rank, 1.0, "")
    vectors = [torch.randn(layout.size, generator=draw) for _ in range(3)]
    x_TI = torch.randn(sum(lengths), width, generator=draw).to(device, dtype)
    drawn_TO = torch.randn(sum(lengths), sum(outputs), generator=draw).to(device, dtype)
    g_TO = drawn_TO if g_TO is None else g_TO
    if is_twin:
        x_TI, g_TO = x_TI.double(), g_TO.double()
    bank = Bank(layout, kernel, device, torch.float64 if is_twin else torch.float32)
    bank.load(layout, vectors, [2.0, 0.5, 3.0], trained)
    bank.reserve(4)
    bank.route = make_route(lengths, clients, slots, 4, device)
    group = tuple(range(len(outputs)))
    y_TO, dx_TI = torch.ones_like(g_TO), torch.ones_like(x_TI)
    z_TM = kernel.forward(bank, group, x_TI, y_TO)
    kept = Kept(x_TI if trained != "b" else None, z_TM if trained != "a" else None)
    kernel.backward(bank, group, kept, g_TO, dx_TI)
    return y_TO, dx_TI, z_TM, bank.grad_SP


def furthest(found: Outcome, exact: Outcome) -> float:
    """Return the largest error, relative to the norm of the exact tensor."""
    pairs = zip(found, exact, strict=True)
    return max(float((ours.double().cpu() - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


UNEVEN = ([66, 1, 3, 2], [2, 2, 0, 0], [0, 1, 2, 2])  # client 1 and slot 3 have no token


@pytest.mark.parametrize("trained", ["both", "a", "b"])
@pytest.mark.parametrize(("rank", "outputs"), [(2, (5, 70, 3)), (8, (64, 16)), (70, (9,))])
def test_the_operator_agrees_with_the_loop(
    rank: int, outputs: tuple[int, ...], trained: str, kernel_device: torch.device
) -> None:
    from fedllm.engine.triton.lora import TritonKernel

    kernels = (TritonKernel(), LoopKernel())
    found, exact = (
        outcome(kernel, rank, outputs, UNEVEN, trained=trained, device=kernel_device) for kernel in kernels
    )
    assert furthest(found, exact) < 1e-5


def test_half_precision_rounds_only(kernel_device: torch.device) -> None:
    """The interpreter multiplies no bfloat16; float16 goes the same ways."""
    from fedllm.engine.triton.lora import TritonKernel

    found, exact = (
        outcome(kernel, 8, (16, 9), UNEVEN, dtype=torch.float16, device=kernel_device)
        for kernel in (TritonKernel(), LoopKernel())
    )
    assert furthest(found, exact) < 2e-3


def test_the_parts_of_a_long_slot_add_up(kernel_device: torch.device) -> None:
    from fedllm.engine.triton.lora import TritonKernel

    long = ([1100], [1], [0])
    kernels = (TritonKernel(), LoopKernel())
    found, exact = (outcome(kernel, 2, (5, 3), long, device=kernel_device) for kernel in kernels)
    assert furthest(found, exact) < 1e-5


def test_a_nan_stays_in_its_slot(kernel_device: torch.device) -> None:
    from fedllm.engine.triton.lora import TritonKernel

    g_TO = torch.ones(72, 9, device=kernel_device)
    g_TO[66] = torch.nan  # the one token of slot 1
    *_, grad_SP = outcome(TritonKernel(), 2, (5, 4), UNEVEN, device=kernel_device, g_TO=g_TO)
    assert torch.isfinite(grad_SP).all(dim=1).tolist() == [True, False, True, True]
