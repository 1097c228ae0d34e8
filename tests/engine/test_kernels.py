"""The LoRA operator's kernels against one product for every token, matrix by matrix."""

from dataclasses import dataclass, replace

import pytest
import torch

from fedllm.adapters.layout import AdapterLayout, LoraMatrix
from fedllm.adapters.parts import part_of
from fedllm.engine.adapter_bank import Bank, Kept, Kernel, make_route
from fedllm.engine.dropout import Drops, Noise, NoisyRow
from fedllm.engine.kernels import LoopKernel, MaskedKernel, adapted_output
from fedllm.models.base import PlainLinear

WIDTH, OUTPUTS, RANK = 6, (5, 3, 4), 2
GROUP = (0, 1, 2)
LAYOUT = AdapterLayout(
    tuple(LoraMatrix(f"m{index}", WIDTH, OUTPUTS[index]) for index in GROUP), RANK, 4.0, "base"
)
SCALES = (2.0, 0.5, 3.0)
LENGTHS, CLIENTS, SLOTS = (4, 1, 3, 2), (2, 2, 0, 0), (0, 1, 2, 2)  # client 1 and slot 3 have no token
EXACT = {"rtol": 0, "atol": 1e-12}
kernels = pytest.mark.parametrize("kernel", [LoopKernel(), MaskedKernel()], ids=["loop", "masked"])


@dataclass(frozen=True, eq=False)
class Case:
    bank: Bank
    starts_CP: torch.Tensor
    x_TI: torch.Tensor
    g_TO: torch.Tensor


def make_case(kernel: Kernel, trained: str = "both") -> Case:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    bank = Bank(LAYOUT, kernel, torch.device("cpu"), torch.float64)
    starts_CP = normal(len(SCALES), LAYOUT.size)
    bank.load(LAYOUT, list(starts_CP), SCALES, trained)
    bank.reserve(4)
    bank.route = make_route(LENGTHS, CLIENTS, SLOTS, 4, bank.device)
    return Case(bank, starts_CP, normal(sum(LENGTHS), WIDTH), normal(sum(LENGTHS), sum(OUTPUTS)))


def token_by_token(case: Case) -> tuple[torch.Tensor, ...]:
    """Return (y [T, O], dx [T, I], gradients [S, P] of whole adapters) from the formulas."""
    y_TO, dx_TI = torch.zeros_like(case.g_TO), torch.zeros_like(case.x_TI)
    grad_SP = torch.zeros(4, LAYOUT.size, dtype=torch.float64)
    owners = zip(CLIENTS, SLOTS, LENGTHS, strict=True)
    of_token = [(client, slot) for client, slot, length in owners for _ in range(length)]
    for x, g, y, dx, (client, slot) in zip(case.x_TI, case.g_TO, y_TO, dx_TI, of_token, strict=True):
        factors, gradients = LAYOUT.factors(case.starts_CP[client]), LAYOUT.factors(grad_SP[slot])
        parts = zip(factors, gradients, g.split(OUTPUTS), y.split(OUTPUTS), strict=True)
        for (a, b), (grad_a, grad_b), own_g, own_y in parts:
            z = SCALES[client] * (a @ x)
            dz = SCALES[client] * (own_g @ b)
            own_y += b @ z
            dx += dz @ a
            grad_a += torch.outer(dz, x)
            grad_b += torch.outer(own_g, z)
    return y_TO, dx_TI, grad_SP


@kernels
@pytest.mark.parametrize("trained", ["both", "a", "b"])
def test_a_group_is_its_matrices_token_by_token(kernel: Kernel, trained: str) -> None:
    case = make_case(kernel, trained)
    bank, y_TO, dx_TI = case.bank, torch.ones_like(case.g_TO), torch.ones_like(case.x_TI)
    z_TM = kernel.forward(bank, GROUP, case.x_TI, y_TO)
    kept = Kept(case.x_TI if trained != "b" else None, z_TM if trained != "a" else None)
    kernel.backward(bank, GROUP, kept, case.g_TO, dx_TI)
    expected_y, expected_dx, expected_SP = token_by_token(case)
    assert z_TM.shape == (len(case.x_TI), len(GROUP) * RANK)
    torch.testing.assert_close(y_TO, expected_y + 1, **EXACT)
    torch.testing.assert_close(dx_TI, expected_dx + 1, **EXACT)
    for got, expected in zip(bank.grad_SP, expected_SP, strict=True):
        torch.testing.assert_close(got, part_of(LAYOUT, expected, trained), **EXACT)


@kernels
def test_a_group_with_dropout_is_each_matrix_alone(kernel: Kernel) -> None:
    """Every matrix drops values of its own, whatever it is computed with."""
    draw = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(sum(OUTPUTS), WIDTH, generator=draw, dtype=torch.float64)
    found = []
    for groups in ([GROUP], [(index,) for index in GROUP]):
        case = make_case(kernel)
        bank = case.bank
        none_T = torch.zeros(0)  # for other devices
        noise = Noise((NoisyRow(0, 5, 0.4, 7),), Drops(none_T, none_T, none_T))
        bank.route = replace(bank.route, noise=noise)
        x_TI = case.x_TI.requires_grad_()
        weights = weight_OI.split(OUTPUTS) if len(groups) > 1 else [weight_OI]
        outputs = [
            adapted_output(x_TI, PlainLinear(weight, None), bank, group)
            for weight, group in zip(weights, groups, strict=True)
        ]
        y_TO = torch.cat(outputs, dim=1)
        y_TO.backward(case.g_TO)  # type: ignore[no-untyped-call]
        found.append((y_TO.detach(), x_TI.grad, bank.grad_SP))
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, **EXACT)


@kernels
def test_a_kernel_says_whether_a_nan_stays_in_its_slot(kernel: Kernel) -> None:
    case = make_case(kernel)
    case.g_TO[0] = float("nan")  # a token of slot 0
    z_TM = kernel.forward(case.bank, GROUP, case.x_TI, torch.zeros_like(case.g_TO))
    kernel.backward(case.bank, GROUP, Kept(case.x_TI, z_TM), case.g_TO, torch.zeros_like(case.x_TI))
    is_sound_S = torch.isfinite(case.bank.grad_SP).all(dim=1)
    assert not bool(is_sound_S[0])
    assert bool(is_sound_S[1:].all()) == kernel.keeps_rows_apart
