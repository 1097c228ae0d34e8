"""Which cores and GPUs the nodes of a run take, with any number of GPUs."""

import pytest
import torch

from fedllm.config.run_config import RunConfig
from scripts.runtimes import machine
from scripts.runtimes.machine import gpus_of, least_nodes, simulation_size


def run_on(device: str) -> RunConfig:
    """Return a run whose base model is on a device."""
    return RunConfig.from_flat({"model.device": device})


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch):
    """Return a function (GPUs, cores, CUDA_VISIBLE_DEVICES) that makes this machine have them."""

    def make(num_gpus: int, num_cores: int = 16, visible: str = "") -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(machine, "num_cores", lambda: num_cores)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


@pytest.mark.parametrize(("num_gpus", "device"), [(0, "auto"), (1, "auto"), (4, "cpu"), (4, "cuda:2")])
def test_one_worker_has_the_whole_machine(machine_of, num_gpus: int, device: str) -> None:
    machine_of(num_gpus)
    size = {"num-supernodes": 1, "client-resources-num-cpus": 16, "init-args-num-cpus": 16}
    assert simulation_size(run_on(device)) == size  # without a word of GPUs: Ray hides none


def test_several_gpus_are_as_many_nodes_and_workers(machine_of) -> None:
    machine_of(4)
    assert simulation_size(run_on("auto")) == {
        "num-supernodes": 4, "client-resources-num-cpus": 4, "init-args-num-cpus": 16,
        "client-resources-num-gpus": 1.0, "init-args-num-gpus": 4,
    }  # fmt: skip


def test_sums_of_shares_have_three_nodes_in_one_worker(machine_of) -> None:
    machine_of(0)
    config = RunConfig.from_flat({"model.device": "cpu", "secure.method": "shares"})
    size = simulation_size(config)
    assert (size["num-supernodes"], least_nodes(config)) == (3, 3)
    assert size["client-resources-num-cpus"] == size["init-args-num-cpus"] == 16


def test_workers_fit_where_gpus_outnumber_cores(machine_of) -> None:
    machine_of(8, num_cores=2)
    size = simulation_size(run_on("cuda"))
    assert size["client-resources-num-cpus"] == 1
    assert size["init-args-num-cpus"] == size["num-supernodes"] == 8


def test_gpus_keep_the_names_of_the_environment(machine_of) -> None:
    machine_of(2, visible="5,GPU-a")
    assert gpus_of(run_on("auto")) == ["5", "GPU-a"]
    machine_of(2)
    assert gpus_of(run_on("auto")) == ["0", "1"]
    assert gpus_of(run_on("cpu")) == gpus_of(run_on("cuda:1")) == []
