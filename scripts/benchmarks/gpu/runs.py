"""Whole runs on a GPU: a round over the bare engine, a thousand clients in a round, the demo."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedllm.config.key import Scalar
from fedllm.models.files import resolve_model
from scripts.benchmarks.models import write_rows
from scripts.benchmarks.runs import ROOT, UNMEASURED, Run, check_same_work, run_cohort, run_worker
from scripts.recipe_arguments import config_of
from scripts.reports import ratios, spread

ROUNDS = 4
THOUSAND, QUICK_MANY = 1000, 10


def measure_rounds(model: str, device: str, *, quick: bool) -> dict[str, Any]:
    """Return the seconds of a run's rounds, of 8 clients with 10 steps of 8 rows, over the bare engine's."""
    changes: dict[str, Scalar] = {
        **UNMEASURED,
        "model.name": model,
        "model.device": device,
        "federation.num-clients": 8,
        "federation.num-rounds": 2 if quick else ROUNDS,
        "train.local-steps": 2 if quick else 10,
        "train.batch-size": 2 if quick else 8,
        "distill.when": "never",
    }
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", 8, rows_per_client=24)
        config = config_of([]).override({**changes, "data.source": str(rows)})
        runs: list[tuple[Run, Run]] = []
        for _ in range(1 if quick else 2):
            bare, local = run_worker("bare", config), run_worker("local", config)
            check_same_work("local", local.trace, bare.trace)
            runs.append((bare, local))
    return {
        "tokens_per_round": list(runs[0][0].trace.tokens),
        "bare_round_s": spread([period for bare, _ in runs for period in bare.periods]),
        "round_s": spread([period for _, local in runs for period in local.periods]),
        "over_bare": ratios(
            [sum(local.periods) for _, local in runs], [sum(bare.periods) for bare, _ in runs]
        ),
    }


def measure_thousand(model: str, device: str, *, quick: bool) -> dict[str, Any]:
    """Return the seconds of a round of 1,000 clients of 4 rows each, and the most memory held."""
    number = QUICK_MANY if quick else THOUSAND
    run = run_cohort(model, number, "svd", 2, 8, device=device)
    trace = run.trace
    return {
        "clients": number,
        "round_s": spread(run.periods),
        "peak_rss_gb": trace.peak_rss / 1e9,
        "peak_gpu_gb": trace.peak_gpu / 1e9,
    }


def measure_demo(model: str, device: str, *, quick: bool) -> dict[str, Any]:
    """Return the seconds of `fedllm run` from its start to its end, the model converted before."""
    resolve_model(model)
    words = [f"model.name={model}", f"model.device={device}"]
    words += ["federation.num-rounds=1", "train.local-steps=1", "distill.when=never"] if quick else []
    seconds = []
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as folder:
        for repetition in range(1 if quick else 2):  # the second finds compiled kernels and a known budget
            command = [sys.executable, "-m", "fedllm", "run", *words]
            command += [f"run.output={folder}/{repetition}", "run.name=demo"]
            began = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"fedllm run ended with {done.returncode}: {done.stderr.strip()[-400:]}")
            seconds.append(time.perf_counter() - began)
    return {"first_s": seconds[0], "s": spread(seconds[1:] or seconds)}
