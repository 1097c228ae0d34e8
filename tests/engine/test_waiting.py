"""What a step asks of a device: how many kernels, how many copies to it, and nothing that it must wait for.

The "meta" device computes nothing, so a value cannot be read from it: whatever tries to, raises.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.config.keys import LoraConfig
from fedllm.engine import decoder
from fedllm.engine.adapter_bank import Bank
from fedllm.engine.decoder_probe import read_decoder
from fedllm.engine.flat_row import predicting_states
from fedllm.engine.gradient_terms import control_correction, proximal_pull
from fedllm.engine.head import Head
from fedllm.engine.jobs import Job
from fedllm.engine.kernels import MaskedKernel
from fedllm.engine.optimizer import RowAdamW
from fedllm.engine.passes import Passes
from fedllm.engine.pointwise import PlainPointwise
from fedllm.engine.steps import step_gradients
from fedllm.engine.token_budget import Limits
from fedllm.models import attention
from fedllm.models.base import layout_of
from tests.engine.no_waiting import no_waiting

META = torch.device("meta")
LORA = LoraConfig(rank=2, alpha=6.0, target_modules="all-linear")
LIMITS = Limits(100_000, 100_000, 100)
# A view or a new name of a tensor is no kernel.
VIEWS = re.compile(
    "view|t|transpose|slice|select|(un)?squeeze|expand|detach|permute|alias|_unsafe_view|as_strided|unbind"
    "|split(_with_sizes)?|(new_)?empty|empty_strided"
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
        if isinstance(result, torch.Tensor) and result.device == META and not VIEWS.fullmatch(name):
            is_copy = any(arg.device != META for arg in given)
            (self.copies if is_copy else self.kernels)[name] += 1
        return result


def stub_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Return something of the right shape that depends on all inputs."""
    groups = query.shape[1] // key.shape[1]
    return (query * (key + value).repeat_interleave(groups, 1)).transpose(1, 2), None


@pytest.fixture
def make_passes(load_tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Passes]:
    """Return a function (whether by the own decoder) -> passes of a tiny model without values."""
    # The attention of a GPU is another kernel, and has tests of its own.
    monkeypatch.setattr(attention, "ragged_attention", stub_attention)
    monkeypatch.setattr(decoder, "ragged_attention", stub_attention)

    def make(is_own: bool = False) -> Passes:
        base = load_tiny("llama", "float32")
        with META:
            model = type(base.model)(base.model.config)
        model.requires_grad_(False)
        bank = Bank(layout_of(base.model, LORA, base.fingerprint), MaskedKernel(), META, torch.float32)
        head = Head(model.get_output_embeddings().weight)
        trunk = read_decoder(model, bank, PlainPointwise()) if is_own else None
        trunk = trunk or partial(predicting_states, model, head=head)
        assert isinstance(trunk, decoder.Decoder) == is_own
        return Passes(replace(base, model=model, device=META), bank, trunk, head, True)

    return make


def recorded_step(passes: Passes, jobs: list[Job], limits: Limits = LIMITS) -> Recorder:
    """Return what a step asks of the device."""
    bank, trainings = passes.bank, [job.training for job in jobs]
    starts = [job.start for job in jobs]
    bank.load(bank.layout, starts, [bank.layout.scale] * len(jobs))
    optimizer = RowAdamW(bank.theta_CP, trainings)
    pull = proximal_pull(bank, starts, trainings)
    correction = control_correction(torch.stack(starts), bank.theta_CP, trainings)
    with passes.attached(), Recorder() as recorder:
        gradients, _ = step_gradients(passes, limits, jobs, 1)
        if pull is not None and correction is not None:
            correction.apply(gradients)
            pull.add_gradient(bank, gradients)
        optimizer.step(gradients)
    return recorder


@pytest.mark.parametrize("is_own", [False, True], ids=["transformers", "own"])
@pytest.mark.parametrize(
    "numbers", [{}, {"dropout": 0.1}, {"proximal": 0.1}, {"proximal": 0.1, "proximal_space": "product"}]
)
def test_a_step_reads_nothing_and_is_told_once(
    numbers: dict, is_own: bool, make_passes: Callable, make_job: Callable
) -> None:
    passes = make_passes(is_own)
    jobs = [make_job(passes.bank.layout, str(seed), seed, **numbers) for seed in range(3)]
    assert recorded_step(passes, jobs).copies == {"copy_": 1}


def test_every_pass_of_a_step_is_told_once(make_passes: Callable, make_job: Callable) -> None:
    passes = make_passes()
    jobs = [make_job(passes.bank.layout, str(seed), seed) for seed in range(3)]
    recorder = recorded_step(passes, jobs, replace(LIMITS, step=1))
    assert recorder.copies == {"copy_": sum(len(job.batches[1]) for job in jobs)}


@pytest.mark.parametrize("is_own", [False, True], ids=["transformers", "own"])
def test_more_clients_are_no_more_kernels(is_own: bool, make_passes: Callable, make_job: Callable) -> None:
    passes = make_passes(is_own)
    jobs = [make_job(passes.bank.layout, str(seed), seed) for seed in range(8)]
    few, many = (recorded_step(passes, jobs[:number]).kernels for number in (2, 8))
    assert few == many


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("numbers", [{}, {"dropout": 0.1}, {"proximal": 0.1}])
def test_a_step_on_a_gpu_waits_for_nothing(
    numbers: dict, dtype: str, make_engine: Callable, make_job: Callable
) -> None:
    engine = make_engine("llama", dtype, device="cuda")
    jobs = [make_job(engine.layout, str(seed), seed, steps=4, **numbers) for seed in range(3)]
    list(engine.train(jobs))  # compiles, tries and records
    list(engine.train(jobs))
    passes, bank = engine.passes, engine.bank
    with passes.attached(), no_waiting():
        for step in range(4):
            step_gradients(passes, engine.limits, jobs, step)
    assert bool(bank.grad_SP.any())
