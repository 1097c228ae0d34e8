"""What a step asks of a device: how many kernels, how many copies to it, and nothing that it must wait for.

The "meta" device computes nothing, so a value cannot be read from it: whatever tries to, raises.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.config.keys import LoraConfig
from fedllm.engine.adapter_bank import Bank
from fedllm.engine.flat_row import predicting_states
from fedllm.engine.head import Head
from fedllm.engine.jobs import Job
from fedllm.engine.kernels import MaskedKernel
from fedllm.engine.optimizer import RowAdamW
from fedllm.engine.passes import Passes
from fedllm.engine.steps import step_gradients
from fedllm.engine.token_budget import Limits
from fedllm.models import attention
from fedllm.models.base import layout_of

META = torch.device("meta")
LORA = LoraConfig(rank=2, alpha=6.0, target_modules="all-linear")
LIMITS = Limits(100_000, 100_000, 100)
# They make a view or a new name of a tensor: no kernel.
VIEWS = frozenset(
    [
        "view",
        "t",
        "transpose",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "permute",
        "alias",
        "_unsafe_view",
        "as_strided",
        "unbind",
        "split_with_sizes",
        "split",
        "empty",
        "empty_strided",
        "new_empty",
    ]
)


class Lists(TorchFunctionMode):
    """Counts tensors made of Python numbers, which are copied without being an operation."""

    def __init__(self, copies: Counter[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in {"tensor", "as_tensor", "new_tensor"} and result.device == META:
            self.copies[func.__name__] += 1
        return result


class Recorder(TorchDispatchMode):
    """Counts operations on the device, and copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.lists = Lists(self.copies)

    def __enter__(self) -> "Recorder":
        self.lists.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim()]
        if isinstance(result, torch.Tensor) and result.device == META and name not in VIEWS:
            is_copy = any(arg.device != META for arg in given)
            (self.copies if is_copy else self.kernels)[name] += 1
        return result


def stub_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Return something of the right shape that depends on all inputs."""
    groups = query.shape[1] // key.shape[1]
    return (query * (key + value).repeat_interleave(groups, 1)).transpose(1, 2), None


@pytest.fixture
def make_passes(load_tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Passes]:
    """Return a function () -> passes of a tiny model without values."""
    monkeypatch.setattr(
        attention, "ragged_attention", stub_attention
    )  # its kernel for a GPU has its own tests

    def make() -> Passes:
        base = load_tiny("llama", "float32")
        with META:
            model = type(base.model)(base.model.config)
        model.requires_grad_(False)
        bank = Bank(layout_of(base.model, LORA, base.fingerprint), MaskedKernel(), META, torch.float32)
        head = Head(model.get_output_embeddings().weight)
        trunk = lambda flat: predicting_states(model, flat, head)  # noqa: E731
        return Passes(replace(base, model=model, device=META), bank, trunk, head, True)

    return make


def recorded_step(passes: Passes, jobs: list[Job]) -> Recorder:
    """Return what the second of two steps asks of the device."""
    bank, layout = passes.bank, passes.bank.layout
    bank.load(layout, [job.start for job in jobs], [layout.scale] * len(jobs))
    optimizer = RowAdamW(bank.theta_CP, [job.training for job in jobs])
    with passes.attached():
        for step in range(2):
            with Recorder() as recorder:
                gradients, _ = step_gradients(passes, LIMITS, jobs, step)
                optimizer.step(gradients)
    return recorder


def test_a_step_reads_nothing_and_is_told_once(make_passes: Callable, make_job: Callable) -> None:
    passes = make_passes()
    jobs = [make_job(passes.bank.layout, str(seed), seed) for seed in range(3)]
    recorder = recorded_step(passes, jobs)
    assert recorder.copies == {"copy_": 1}


def test_more_clients_are_no_more_kernels(make_passes: Callable, make_job: Callable) -> None:
    passes = make_passes()
    jobs = [make_job(passes.bank.layout, str(seed), seed) for seed in range(8)]
    few, many = (recorded_step(passes, jobs[:number]).kernels for number in (2, 8))
    assert few == many
