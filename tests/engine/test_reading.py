"""Reading token after token: a cache of fixed size against one that grows, and nothing read back."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.adapters.layout import AdapterLayout
from fedllm.config.keys import LoraConfig
from fedllm.engine.adapter_bank import Bank
from fedllm.engine.generate import Written, continuations
from fedllm.engine.kernels import MaskedKernel
from fedllm.engine.layers import attached
from fedllm.engine.reading import (
    FixedReader,
    GrowingReader,
    can_be_fixed,
    left_padded,
    recorded,
    rows_at_once,
)
from fedllm.models.base import BaseModel, layout_of
from tests.models.families import tiny_model

BEGINNINGS = [(7, 9, 30, 31, 32, 33), (11,), (20, 21, 22)]


def greedy(step_1: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    return logits_BV.argmax(dim=1)


def layout_for(base: BaseModel) -> AdapterLayout:
    return layout_of(base.model, LoraConfig(rank=2), base.fingerprint)


def test_padding_goes_left() -> None:
    rows, mask = left_padded([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert rows.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_a_fixed_cache_gives_the_logits_of_a_growing_one(kind: str, load_tiny: Callable) -> None:
    """Beyond the window of 8 tokens too, which every other layer of gemma3 has."""
    base = load_tiny(kind, "float64")
    assert can_be_fixed(base)
    fixed, grown = (kind(base, BEGINNINGS, 5) for kind in (FixedReader, GrowingReader))
    torch.testing.assert_close(fixed.first(), grown.first(), rtol=0, atol=1e-12)
    for token in (17, 4, 250, 18, 90):
        last_B1 = torch.tensor([[token], [token + 1], [token + 2]])
        torch.testing.assert_close(fixed.next(last_B1), grown.next(last_B1), rtol=0, atol=1e-12)
    texts = [continuations(base, BEGINNINGS, 12, greedy, is_fixed=is_fixed) for is_fixed in (True, False)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1", "xlm"])
def test_a_model_of_another_cache_is_left_to_grow(kind: str, load_tiny: Callable) -> None:
    assert not can_be_fixed(replace(load_tiny("llama", "float32"), model=tiny_model(kind)))


class NoCopies(TorchDispatchMode):
    """Refuses whatever would carry values from the CPU to a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim()]
        assert func.overloadpacket.__name__ != "lift_fresh", "a list became a tensor"
        assert all(arg.device.type == "meta" for arg in given), func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_token_needs_no_look_at_the_device(load_tiny: Callable) -> None:
    """On the device "meta" no tensor has values, so whatever asks for one raises."""
    device = torch.device("meta")
    base = load_tiny("llama", "float32")
    base = replace(base, model=copy.deepcopy(base.model).to(device), device=device)
    bank = Bank(layout_for(base), MaskedKernel(), device, torch.float32)
    bank.load(bank.layout, [torch.zeros(bank.layout.size)] * 2, [1.0, 1.0])
    written, reader = Written(3, 8, {0}, device), FixedReader(base, BEGINNINGS, 8)
    with attached(base.model, bank), bank.whole_rows((0, 1, 0)):
        written.take(greedy(written.step_1, reader.next(written.last_B1)))  # routes the rows, once for all
        with NoCopies():
            written.take(greedy(written.step_1, reader.next(written.last_B1)))
    with pytest.raises(RuntimeError):
        assert not written.is_complete


def test_rows_end_with_their_first_end_token() -> None:
    written = Written(3, 4, {0, 2}, torch.device("cpu"))
    for tokens, is_complete in (([5, 2, 7], False), ([0, 6, 8], False), ([9, 0, 2], True)):
        written.take(torch.tensor(tokens))
        assert written.is_complete == is_complete
    assert written.rows() == [(5, 0), (2,), (7, 8, 2)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_memory_decides_how_many_rows_a_gpu_writes(
    kind: str, load_tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(load_tiny("llama", "float32"), model=tiny_model(kind), device=torch.device("cuda"))
    for name, answer in (("memory_reserved", 0), ("memory_allocated", 0), ("mem_get_info", (10**9, 10**9))):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert 1 < rows_at_once(base, 4000) < rows_at_once(base, 40)


def test_a_failed_capture_leaves_the_usual_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    streams = ["usual"]

    class Capture(nullcontext[None]):
        def __enter__(self) -> None:
            streams.append("of the capture")

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    stubs = {
        "CUDAGraph": object,
        "graph": lambda *_, **__: Capture(),
        "device": nullcontext,
        "current_stream": lambda: streams[-1],
        "set_stream": streams.append,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)

    def step() -> None:
        """Do nothing."""

    assert recorded(step, torch.device("cuda")) is step
    assert streams[-1] == "usual"
    assert "without a CUDA graph" in caplog.text


@pytest.mark.gpu
def test_a_gpu_writes_the_texts_of_a_cpu_by_a_graph(
    make_engine: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    texts = []
    for device in ("cuda", "cpu"):
        engine = make_engine("llama", "float32", device=device)
        generator = torch.Generator().manual_seed(0)
        vectors = [0.3 * torch.randn(engine.layout.size, generator=generator) for _ in range(2)]
        owners = [vectors[0], vectors[1], vectors[0]]
        choose = lambda _rows, step, logits: greedy(step, logits)  # noqa: E731
        texts.append(engine.continue_rows(engine.layout, owners, BEGINNINGS, 40, choose))
    assert texts[0] == texts[1]
    assert "without a CUDA graph" not in caplog.text
