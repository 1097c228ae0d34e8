"""The noise of a step is the same wherever it is drawn."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedllm.adapters.layout import at_rank
from fedllm.adapters.parts import part_size
from fedllm.engine.device_trial import stands_trial
from fedllm.engine.job_rows import rows_of_jobs
from fedllm.engine.jobs import StepNoise
from fedllm.engine.step_noise import device_keys, draws_as_a_cpu, step_noise, step_noises

NOISES = tuple(StepNoise(bytes([row] * 32), 0.5 + row) for row in range(3))


def test_a_devices_noise_is_that_of_each_job(kernel_device: torch.device) -> None:
    means = torch.randn(2, 77, generator=torch.Generator().manual_seed(0))
    keys = device_keys(NOISES, 3, kernel_device)
    found = means.to(kernel_device, copy=True)
    keys.add(found, 2)  # the third job has finished
    expected = [mean + step_noise(n, 2, mean).float() for n, mean in zip(NOISES, means, strict=False)]
    torch.testing.assert_close(found.cpu(), torch.stack(expected), rtol=3e-7, atol=1e-7)


def test_a_device_is_trusted_after_a_trial(kernel_device: torch.device) -> None:
    assert draws_as_a_cpu(kernel_device)


@pytest.mark.parametrize(
    "failure", [None, RuntimeError("no such instruction\nand more"), AssertionError("no such instruction")]
)
def test_a_device_that_fails_its_trial_is_left_with_one_line(
    failure: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")

    def trial() -> bool:
        if failure:
            raise failure
        return False

    with caplog.at_level(logging.WARNING, "fedllm.training"):
        assert not stands_trial(torch.device("cpu"), "noise", trial)
    (line,) = caplog.messages
    assert ("no such instruction" if failure else "its numbers are others") in line
    assert "\n" not in line


@pytest.mark.gpu
def test_noise_on_a_gpu_is_that_on_a_cpu(make_engine: Callable, make_job: Callable) -> None:
    layout = make_engine("llama").layout
    narrow = at_rank(layout, 1)
    jobs = [replace(make_job(layout), trained="b", noise=noise) for noise in NOISES]
    jobs[1] = replace(jobs[1], start=torch.zeros(narrow.size), layout=narrow)
    for chosen in (jobs[:1] + jobs[2:], jobs):  # all of one rank, and a narrower one between
        rows = rows_of_jobs(chosen, layout)
        found = torch.linspace(-1, 1, len(chosen) * part_size(layout, "b")).view(len(chosen), -1).cuda()
        expected = found.cpu()
        step_noises(rows, found.device).add(found, 1)
        step_noises(rows, expected.device).add(expected, 1)
        torch.testing.assert_close(found.cpu(), expected, rtol=3e-7, atol=1e-7)
