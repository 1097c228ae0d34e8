"""A pass that is padded to the sizes of a recording: the same losses and gradients."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedllm.engine.flat_row import SHORTEST_SHARED
from fedllm.engine.graphs import Sizes, rounded_up
from fedllm.engine.head import CrossEntropy
from fedllm.engine.kernels import LoopKernel, MaskedKernel
from fedllm.engine.pass_inputs import PassArrays, padded, place
from fedllm.engine.passes import Item
from fedllm.models.chat import Encoded

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def items_of(make_rows: Callable, *, is_shared: bool) -> list[Item]:
    (prefix,) = make_rows([SHORTEST_SHARED + 2], seed=5)
    begin = prefix if is_shared else Encoded((), ())
    rows = [Encoded(begin.tokens + row.tokens, begin.labels + row.labels) for row in make_rows([5, 21, 2, 9])]
    return [
        Item(row, client, client, 0.1 * (client + 1)) for row, client in zip(rows, (0, 0, 2, 2), strict=True)
    ]


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("kernel", [LoopKernel(), MaskedKernel()], ids=["loop", "masked"])
@pytest.mark.parametrize("more_keys", [0, 40])
def test_padding_changes_no_loss_and_no_gradient(
    kernel: object, is_shared: bool, more_keys: int, make_engine: Callable, make_rows: Callable
) -> None:
    engine = make_engine("llama")
    passes, bank = engine.passes, engine.bank
    bank.kernel = kernel
    draw = torch.Generator().manual_seed(0)
    starts = [0.1 * torch.randn(engine.layout.size, generator=draw) for _ in range(3)]
    bank.load(engine.layout, starts, [engine.layout.scale] * 3)
    bank.reserve(3)
    arrays = passes.arrange(items_of(make_rows, is_shared=is_shared), backward=True)
    room = rounded_up(arrays.sizes)
    room = replace(room, keys=room.keys + more_keys, samples=7, supervised=room.supervised + 5)
    room = replace(room, sequences=room.sequences + 9, tokens=room.tokens + 10, keys=room.keys + 10)

    def run(arrays: PassArrays) -> tuple[torch.Tensor, torch.Tensor]:
        bank.reserve(3)
        inputs = place(arrays, passes.base.device)
        with passes.attached():
            sums = passes.run(inputs, CrossEntropy(inputs.flat.targets_N), backward=True)
        return sums, bank.grad_SP.clone()

    full = padded(arrays, room)
    assert replace(full.sizes, clients=0, longest_keys=0) == replace(room, clients=0, longest_keys=0)
    (sums, gradients), (padded_sums, padded_gradients) = run(arrays), run(full)
    torch.testing.assert_close(padded_sums[:4], sums, **EXACT)
    assert not padded_sums[4:].any()
    torch.testing.assert_close(padded_gradients, gradients, **EXACT)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_passes_of_one_room_have_equal_sizes(rate: float, make_engine: Callable, make_rows: Callable) -> None:
    """So one buffer serves all of them."""
    engine = make_engine("llama")
    engine.bank.load(engine.layout, [torch.zeros(engine.layout.size)] * 3, [1.0] * 3)
    engine.bank.reserve(3)
    items = [replace(item, dropout=rate, seed=7) for item in items_of(make_rows, is_shared=False)]
    room = Sizes(64, 64, 16, 32, 32, 48, 8, 4, 3)
    shapes = []
    for part in (items, items[1:], items[:2]):
        full = padded(engine.passes.arrange(part, backward=True), room)
        shapes.append({name: (array.shape, array.dtype) for name, array in full.named().items()})
    assert shapes[0] == shapes[1] == shapes[2]
    assert ("rates_T" in shapes[0]) == (rate > 0)
