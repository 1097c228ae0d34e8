"""What of this machine each node of a run takes: cores, and a GPU where there are several."""

import os

import torch

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.secure.additive import NUM_HOLDERS


def simulation_size(config: RunConfig) -> dict[str, Scalar]:
    """Return Flower's simulation settings: one worker a GPU, or else one, and a node for each worker.

    A second worker on a CPU or a GPU would only share it with the first and hold a second base model. Ray is
    told what the machine has: by its own count, which a container's limit may lower, no worker might fit, and
    a worker that does not fit is never started.
    """
    num_workers = max(1, len(gpus_of(config)))
    cores = max(1, num_cores() // num_workers)  # a worker gets as many threads as it is given cores
    size: dict[str, Scalar] = {
        "num-supernodes": max(num_workers, least_nodes(config)),
        "client-resources-num-cpus": cores,
        "init-args-num-cpus": cores * num_workers,
    }
    if num_workers > 1:  # Ray shows each worker a GPU of its own; a single worker sees the GPU without Ray
        size |= {"client-resources-num-gpus": 1.0, "init-args-num-gpus": num_workers}
    return size


def least_nodes(config: RunConfig) -> int:
    """Return the fewest nodes that share the clients of a run on this machine: each hosts as many as fit."""
    return NUM_HOLDERS if config.secure.method == "shares" else 1


def gpus_of(config: RunConfig) -> list[str]:
    """Return the GPUs that a run may spread over, as `CUDA_VISIBLE_DEVICES` names them."""
    if config.model.device not in ("auto", "cuda"):
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    number = torch.cuda.device_count()
    return seen.split(",")[:number] if seen else [str(index) for index in range(number)]


def num_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
