"""A training step's seconds on a resident engine, its share of the card's peak, and what privacy adds.

Seconds of a step are those of a job of many steps less those of one of few, over the difference: what loads
the adapters and what reads the results is not a step's. A GPU is waited for at both ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedllm.engine.engine import Engine
from fedllm.engine.jobs import Job, StepNoise
from fedllm.privacy.keys import NUM_BYTES, derived_key
from fedllm.seeds import derive_seed
from scripts.benchmarks.arithmetic import trunk_weights
from scripts.benchmarks.models import bench_engine, plain_training, random_rows, vocabulary_of
from scripts.benchmarks.timing import device_seconds
from scripts.benchmarks.workloads import started_adapter
from scripts.reports import Spread, spread

ROW_TOKENS, LEARNT_SHARE = 200, 0.5
FEW, MANY = 2, 12  # steps of the two jobs whose difference is timed
PRIVATE_ROWS = 16  # a step of each private client
CLIP = 0.1


def peak_flops(device: torch.device, *, quick: bool) -> float:
    """Return the FLOP per second of the device's best product of two large bfloat16 matrices."""
    size = 512 if quick else 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(5):
        seconds.append(device_seconds(lambda: [left @ right for _ in range(10)]) / 10)
    return 2 * size**3 / min(seconds)


def step_jobs(engine: Engine, num_tokens: int, num_clients: int, steps: int, seed: int) -> list[Job]:
    """Return clients whose steps have `num_tokens` tokens together, in rows of ROW_TOKENS."""
    num_rows = max(num_clients, num_tokens // ROW_TOKENS)
    jobs = []
    for client in range(num_clients):
        # The rows are dealt out: 10 rows over 8 clients are 2 for the first two and 1 for the others.
        own = num_rows // num_clients + (client < num_rows % num_clients)
        key = derive_seed(seed, "bench-gpu", client)
        batches = tuple(
            random_rows([ROW_TOKENS] * own, vocabulary_of(engine.base), derive_seed(key, step), LEARNT_SHARE)
            for step in range(steps)
        )
        start = started_adapter(engine.layout, seed + client)
        jobs.append(Job(str(client), start, batches, plain_training(steps, own)))
    return jobs


def seconds_of_step(
    engine: Engine, num_tokens: int, num_clients: int, *, repetitions: int, seed: int = 0
) -> Spread:
    """Return the seconds of one step of forward, backward and AdamW, all clients in as few passes as fit."""
    few, many = (step_jobs(engine, num_tokens, num_clients, steps, seed) for steps in (FEW, MANY))
    own, engine.token_budget = engine.token_budget, max(num_tokens, engine.token_budget)
    try:
        train_seconds(engine, few)  # warm: kernels are compiled, graphs recorded
        differences = [train_seconds(engine, many) - train_seconds(engine, few) for _ in range(repetitions)]
        return spread([difference / (MANY - FEW) for difference in differences])
    finally:
        engine.token_budget = own


def train_seconds(engine: Engine, jobs: Sequence[Job]) -> float:
    """Return the seconds of training jobs together."""
    return device_seconds(lambda: list(engine.train(jobs)))


def step_flop(engine: Engine, num_tokens: int) -> float:
    """Return the arithmetic of a step: 4 per trunk weight and token, 4 per head weight and learnt token.

    LoRA, attention and all that is not a matrix product count as nothing.
    """
    model = engine.base.model
    text = model.config.get_text_config()
    trunk = sum(weight.numel() for weight in trunk_weights(model).values())
    head = text.vocab_size * text.hidden_size
    return float(4 * num_tokens * (trunk + LEARNT_SHARE * head))


def measure_steps(
    name: str, sizes: Mapping[tuple[int, int], str], device: str, *, quick: bool
) -> dict[str, Any]:
    """Return milliseconds, tokens a second and the share of the peak; sizes are (tokens, clients)."""
    engine = bench_engine(name, device, "all-linear")
    peak = peak_flops(engine.base.device, quick=quick)
    found: dict[str, Any] = {"model": name, "peak_tflop_per_s": peak / 1e12}
    for (num_tokens, num_clients), title in sizes.items():
        seconds = seconds_of_step(engine, num_tokens, num_clients, repetitions=2 if quick else 5)
        found[title] = {
            "ms": spread([1e3 * value for value in (seconds.min, seconds.median, seconds.max)]),
            "tokens_per_s": num_tokens / seconds.median,
            "share_of_peak": step_flop(engine, num_tokens) / seconds.median / peak,
        }
    return found


def measure_privacy(names: tuple[str, ...], device: str, *, quick: bool) -> dict[str, Any]:
    """Return a DP-SGD step's seconds, by example and noised, over those of one without, by model."""
    return {name: _privacy_ratio(name, device, quick=quick) for name in names}


def _privacy_ratio(name: str, device: str, *, quick: bool) -> Spread:
    engine = bench_engine(name, device, "all-linear")
    steps = 2 if quick else 8
    rows = 4 if quick else PRIVATE_ROWS
    (job,) = step_jobs(engine, rows * ROW_TOKENS, 1, steps, seed=0)
    key = derived_key(bytes(NUM_BYTES), "bench-gpu-noise")  # a benchmark has no secret to keep
    private = replace(job, example_clip=CLIP, noise=StepNoise(key, CLIP / rows))
    ratios = []
    for _ in range(3 if quick else 6):
        plain, noised = (train_seconds(engine, [one]) for one in (job, private))
        ratios.append(noised / plain)
    return spread(ratios[1:])  # the first compiles and records
