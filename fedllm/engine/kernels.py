"""The LoRA operator over a row of tokens that belong to many adapters (LoRA, arXiv 2106.09685).

y_t = W x_t + b + scale_c B_c A_c x_t, where c is the client that token t belongs to. The backward pass adds
the gradient of every slot's factors straight into the bank: autograd holds no parameter and makes no copy.
Two kernels compute the same. `loop` takes one small product per client. `masked` takes a fixed number of
dense ones for any number of clients, which suits a GPU: a token's activations are zeroed outside its own
client's ranks. Matrices that share one input x form a group: their outputs lie side by side in y, their
activations in z.
Tensor suffixes: T token, C client, S slot, R rank, M ranks of a group, I input feature, O output feature.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import linear

from fedllm.engine.adapter_bank import Bank, Group, Kept, Segment
from fedllm.models.base import PlainLinear


@dataclass(frozen=True, eq=False)
class LoopKernel:
    """One product per client (parameters) and per slot (gradients); best on a CPU, or for one client.

    A CPU takes three to five times as long for a product [T, R] or [O, R] of few columns as for the same
    with few rows. So activations [T, M] lie in memory rank by rank, and B's gradient is formed transposed.
    Computes in the base model's dtype and accumulates in the bank's: of bfloat16 a copy in float32 of every
    input would cost more than the products.
    """

    keeps_rows_apart: ClassVar[bool] = True

    def forward(self, bank: Bank, group: Group, x_TI: torch.Tensor, y_TO: torch.Tensor) -> torch.Tensor:
        """Add the adapters' output to y in place; see `Kernel`."""
        rank, clients = bank.layout.rank, bank.route_of(x_TI.shape[0]).clients
        z_TM = x_TI.new_empty(len(group) * rank, x_TI.shape[0]).T  # rank by rank
        a_CMI = _stacked_a(bank, group, x_TI.dtype)
        for row, x, z in _pieces(clients, x_TI, z_TM):
            torch.mm(x, a_CMI[row].T, out=z)
            z.mul_(bank.scales[row])
        for index, ranks, outputs in _columns(bank, group):
            b_COR = bank.factors(index)[1].to(x_TI.dtype)
            for row, y, z in _pieces(clients, y_TO[:, outputs], z_TM[:, ranks]):
                _add_product(y, z, b_COR[row].T)
        return z_TM

    def backward(
        self, bank: Bank, group: Group, kept: Kept, g_TO: torch.Tensor, dx_TI: torch.Tensor | None
    ) -> None:
        """Add every slot's gradients to the bank, and the adapters' part of dx to dx in place."""
        dz_TM = g_TO.new_empty(len(group) * bank.layout.rank, g_TO.shape[0]).T
        for index, ranks, outputs in _columns(bank, group):
            z_TR = None if kept.z_TM is None else kept.z_TM[:, ranks]
            dz_TR = dz_TM[:, ranks] if dx_TI is not None or kept.x_TI is not None else None
            _loop_backward(bank, index, kept.x_TI, z_TR, g_TO[:, outputs], dz_TR)
        if dx_TI is not None:
            a_CMI = _stacked_a(bank, group, g_TO.dtype)
            for row, dx, dz in _pieces(bank.route.clients, dx_TI, dz_TM):
                _add_product(dx, dz, a_CMI[row])


def _stacked_a(bank: Bank, group: Group, dtype: torch.dtype) -> torch.Tensor:
    """Return every client's A of the group's matrices, one below the other, [C, M, I]."""
    parts = [bank.factors(index)[0].to(dtype) for index in group]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _loop_backward(
    bank: Bank,
    index: int,
    x_TI: torch.Tensor | None,
    z_TR: torch.Tensor | None,
    g_TO: torch.Tensor,
    dz_TR: torch.Tensor | None,
) -> None:
    """Add the gradients of one matrix to the bank; write that of z to `dz_TR` where anything needs it."""
    b_COR = bank.factors(index)[1].to(g_TO.dtype)
    grad_a_SRI, grad_b_SOR = bank.gradients(index)
    if grad_b_SOR is not None and z_TR is not None:
        grads_b = grad_b_SOR.unbind()  # all views at once: one by one they cost as much as the products
        for row, g, z in _pieces(bank.route.slots, g_TO, z_TR):
            grads_b[row].add_((z.T @ g).T)
    if dz_TR is None:
        return
    for row, g, dz in _pieces(bank.route.clients, g_TO, dz_TR):
        torch.mm(g, b_COR[row], out=dz)
        dz.mul_(bank.scales[row])
    if grad_a_SRI is not None and x_TI is not None:
        grads_a = grad_a_SRI.unbind()
        for row, x, dz in _pieces(bank.route.slots, x_TI, dz_TR):
            _add_product(grads_a[row], dz.T, x)


@dataclass(frozen=True, eq=False)
class MaskedKernel:
    """All adapters' ranks side by side, masked to each token's own: a dozen dense products for any number.

    Exact, since the masked activations are zeros; but zero times NaN is NaN, so what one row is can reach
    another. A diverged client's factors cannot: where they are no numbers they count as zero in the products,
    and stay what they are in the bank. Computes in the base model's dtype and accumulates in the bank's. The
    extra work is 2 C R (I + O) operations a token, small while C R is a few hundred.
    """

    keeps_rows_apart: ClassVar[bool] = False

    def forward(self, bank: Bank, group: Group, x_TI: torch.Tensor, y_TO: torch.Tensor) -> torch.Tensor:
        """Add the adapters' output to y in place; see `Kernel`."""
        owners_T = bank.route_of(x_TI.shape[0]).tensors.owners_T
        scale_T1 = bank.scales_C.to(x_TI.dtype)[owners_T, None]
        parts = []
        for index, _, outputs in _columns(bank, group):
            a_CRI, b_COR = bank.factors(index)
            # Every token meets every client's A in one product; what is not its own client's is thrown away.
            all_TM = x_TI @ a_CRI.flatten(0, 1).to(x_TI.dtype).T
            z_TR = _own_ranks(all_TM, owners_T, bank.layout.rank) * scale_T1
            wide = _spread(z_TR, owners_T, len(a_CRI))
            y_TO[:, outputs].addmm_(wide, _numbers(b_COR.permute(0, 2, 1), x_TI.dtype))
            parts.append(z_TR)
        return torch.cat(parts, dim=1)

    def backward(
        self, bank: Bank, group: Group, kept: Kept, g_TO: torch.Tensor, dx_TI: torch.Tensor | None
    ) -> None:
        """Add gradients to the bank and to dx; see `Kernel`."""
        owners_T, slots_T = bank.route.tensors.owners_T, bank.route.tensors.slots_T
        scale_T1 = bank.scales_C.to(g_TO.dtype)[owners_T, None]
        num_slots, rank = len(bank.grad_SP), bank.layout.rank
        for index, ranks, outputs in _columns(bank, group):
            a_CRI, b_COR = bank.factors(index)
            grad_a_SRI, grad_b_SOR = bank.gradients(index)
            own_TO = g_TO[:, outputs]
            if grad_b_SOR is not None and kept.z_TM is not None:
                # A token's z stands in its slot's columns alone, so one product sums every slot's own tokens.
                wide = _spread(kept.z_TM[:, ranks], slots_T, num_slots)
                grad_b_SOR.add_((own_TO.T @ wide).view(-1, num_slots, rank).permute(1, 0, 2))
            if grad_a_SRI is None and dx_TI is None:
                continue
            all_TM = own_TO @ b_COR.permute(1, 0, 2).flatten(1, 2).to(g_TO.dtype)
            dz_TR = _own_ranks(all_TM, owners_T, rank) * scale_T1
            if dx_TI is not None:
                dx_TI.addmm_(_spread(dz_TR, owners_T, len(a_CRI)), _numbers(a_CRI, g_TO.dtype))
            if grad_a_SRI is not None and kept.x_TI is not None:
                grad_a = _spread(dz_TR, slots_T, num_slots).T @ kept.x_TI
                grad_a_SRI.add_(grad_a.view(num_slots, rank, -1))


class LoraFunction(torch.autograd.Function):
    """Frozen linear layers of one input plus adapters; `frozen` None means the caller adds those layers.

    `tap` is a scalar that requires a gradient: it makes autograd call `backward` though no parameter is an
    input, and nothing below the lowest adapted layer needs one.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, tap: torch.Tensor, frozen: PlainLinear | None, bank: Bank, group: Group
    ) -> torch.Tensor:
        """Return y [T, O], the outputs of the group's matrices side by side."""
        y_TO = frozen_output(x_TI, frozen, bank, group)
        if bank.route.noise:
            parts = []
            for index, _, outputs in _columns(bank, group):  # each drops values of its own
                mask_TI = bank.keep_mask(index, x_TI)
                seen_TI = x_TI if mask_TI is None else x_TI * mask_TI
                parts.append(bank.kernel.forward(bank, (index,), seen_TI, y_TO[:, outputs]))
            z_TM = torch.cat([z_TR.T for z_TR in parts]).T
        else:
            z_TM = bank.kernel.forward(bank, group, x_TI, y_TO)
        # The gradient of A needs x, that of B needs z: what trains one factor keeps one of them.
        ctx.save_for_backward(x_TI if bank.trained != "b" else None, z_TM if bank.trained != "a" else None)
        ctx.frozen, ctx.bank, ctx.group = frozen, bank, group
        return y_TO

    @staticmethod
    def backward(ctx: Any, g_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return dx where something below needs it; the factors' gradients go into the bank."""
        bank, group, (x_TI, z_TM) = ctx.bank, ctx.group, ctx.saved_tensors
        dx_TI = None
        if ctx.needs_input_grad[0]:
            width = bank.layout.matrices[group[0]].in_features
            dx_TI = g_TO.new_zeros(len(g_TO), width) if ctx.frozen is None else g_TO @ ctx.frozen.weight_OI
        if bank.route.noise:
            for index, ranks, outputs in _columns(bank, group):
                z_TR = None if z_TM is None else z_TM[:, ranks]
                _noisy_backward(bank, index, Kept(x_TI, z_TR), g_TO[:, outputs], dx_TI)
        else:
            bank.kernel.backward(bank, group, Kept(x_TI, z_TM), g_TO, dx_TI)
        return dx_TI, None, None, None, None


def _noisy_backward(
    bank: Bank, index: int, kept: Kept, g_TO: torch.Tensor, dx_TI: torch.Tensor | None
) -> None:
    """Do the kernel's backward pass for one matrix whose input went through a dropout mask."""
    like_TI = dx_TI if kept.x_TI is None else kept.x_TI
    mask_TI = None if like_TI is None else bank.keep_mask(index, like_TI)
    if mask_TI is None:
        bank.kernel.backward(bank, (index,), kept, g_TO, dx_TI)
        return
    # The adapter saw mask * x, so its part of dx goes through the mask too, apart from the frozen layer's.
    seen_TI = None if kept.x_TI is None else kept.x_TI * mask_TI
    own_TI = None if dx_TI is None else torch.zeros_like(dx_TI)
    bank.kernel.backward(bank, (index,), Kept(seen_TI, kept.z_TM), g_TO, own_TI)
    if dx_TI is not None and own_TI is not None:
        dx_TI.addcmul_(own_TI, mask_TI)


def adapted_output(x_TI: torch.Tensor, frozen: PlainLinear | None, bank: Bank, group: Group) -> torch.Tensor:
    """Return the operator's output [T, O], with gradients on the way back where they are wanted."""
    if not torch.is_grad_enabled():  # nothing is kept for a backward pass, and nothing is dropped
        y_TO = frozen_output(x_TI, frozen, bank, group)
        bank.kernel.forward(bank, group, x_TI, y_TO)
        return y_TO
    inputs = (x_TI, bank.tap, frozen, bank, group)
    return LoraFunction.apply(*inputs)  # type: ignore[no-untyped-call,no-any-return]


def frozen_output(x_TI: torch.Tensor, frozen: PlainLinear | None, bank: Bank, group: Group) -> torch.Tensor:
    """Return W x + b, or zeros where the caller adds the frozen layers itself."""
    if frozen is not None:
        return linear(x_TI, frozen.weight_OI, frozen.bias_O)
    return x_TI.new_zeros(x_TI.shape[0], sum(bank.layout.matrices[index].out_features for index in group))


def _columns(bank: Bank, group: Group) -> Iterator[tuple[int, slice, slice]]:
    """Yield every matrix of a group with its columns of z [T, M] and of y [T, O]."""
    rank, begin = bank.layout.rank, 0
    for place, index in enumerate(group):
        end = begin + bank.layout.matrices[index].out_features
        yield index, slice(place * rank, (place + 1) * rank), slice(begin, end)
        begin = end


def _own_ranks(all_TM: torch.Tensor, owners_T: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the R columns of each token's own row: [T, rows * R] -> [T, R]."""
    per_row = all_TM.view(all_TM.shape[0], -1, rank)
    index = owners_T[:, None, None].expand(-1, 1, rank)
    return per_row.gather(1, index)[:, 0]


def _numbers(factors_CRD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return all clients' factors as the rows of one matrix [C R, D], zero where they are no numbers."""
    return factors_CRD.flatten(0, 1).to(dtype).nan_to_num(0.0, 0.0, 0.0)


def _spread(own_TR: torch.Tensor, owners_T: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the inverse: each token's R values at its own row, zeros elsewhere, [T, num_rows * R]."""
    num_tokens, rank = own_TR.shape
    wide = own_TR.new_zeros(num_tokens, num_rows, rank)
    wide.scatter_(1, owners_T[:, None, None].expand(-1, 1, rank), own_TR[:, None])
    return wide.view(num_tokens, -1)


def _pieces(parts: tuple[Segment, ...], *tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield every segment's row of the bank and its tokens of every tensor [T, ...], as views.

    Split in one call a tensor: with many short segments, views taken one by one cost as much as the products.
    """
    lengths = [part.end - part.begin for part in parts]
    rows = [part.row for part in parts]
    return zip(rows, *(tensor.split_with_sizes(lengths) for tensor in tensors), strict=True)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Do total += left @ right, where total may be of the bank's higher precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
