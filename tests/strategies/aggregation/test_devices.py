"""Wide products of many clients on a GPU: the same numbers, and nothing but them leaves the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fedllm.adapters.shapes import CPU
from strategies.aggregation import robust, sums
from strategies.aggregation.devices import product_device
from tests.builders import small_layout

LAYOUT = small_layout(rank=2)


def held_updates(number: int = 9) -> tuple[sums.HeldUpdate, ...]:
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(number, LAYOUT.size, generator=generator)
    return tuple(sums.HeldUpdate(str(n), 1.0 + n, 2, delta.clone()) for n, delta in enumerate(deltas))


def everything(held: tuple[sums.HeldUpdate, ...]) -> list[torch.Tensor]:
    """Return all that is computed of wide products: folded sums, held updates, Gram matrices."""
    folded = sums.fold(sums.empty_sums(LAYOUT, with_products=True), LAYOUT, held)
    weights_K = torch.tensor([update.weight for update in held], dtype=torch.float64)
    changes = [sums.change_of_sums(folded, LAYOUT, place, slice(0, 1)) for place in (0, 1)]
    changes += [
        sums.change_of_held(LAYOUT, held, weights_K / weights_K.sum(), (index,), with_residual=True)
        for index in (0, 1)
    ]
    grams_KK = robust.change_grams(LAYOUT, held[0].delta, [update.delta for update in held])
    return [grams_KK, *(t for c in changes for t in (c.a_LRI, c.b_LOR, c.residual.dense))]


@contextmanager
def all_products_on(device: torch.device) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (sums, robust):
            patch.setattr(module, "product_device", lambda columns, num_bytes=0: device)
        yield


def test_products_stay_on_the_cpu_of_a_process_without_a_gpu() -> None:
    assert product_device(10**6) == CPU


def test_products_of_a_device_come_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", which refuses most sums of its tensors and others, as a GPU does, and has no values."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    with all_products_on(torch.device("meta")):
        folded = sums.empty_sums(LAYOUT, with_products=True)
        assert {product.device.type for product in folded.products} == {"meta"}
        assert {tensor.device.type for tensor in everything(held_updates())} == {"cpu"}


@pytest.mark.gpu
def test_a_gpu_gives_the_numbers_of_the_cpu() -> None:
    expected = everything(held_updates())
    with all_products_on(torch.device("cuda")):
        found = everything(held_updates())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
