"""The comparison with pfl-research in an environment that has it, for `scripts.benchmarks.client`.

PYTHON -m scripts.benchmarks.cohort_worker '{"seed": 0, "repetitions": 3, "threads": 1, "quick": false}'
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.cohort import SMALL, VOCABULARIES, compare, make_cohort
from scripts.benchmarks.peers.environment import PFL, peer_python
from scripts.benchmarks.peers.shared import quiet_huggingface
from scripts.benchmarks.workloads import open_bench
from scripts.reports import Spread

ROOT = Path(__file__).parents[2]


def compare_elsewhere(**options: int) -> dict[str, Any]:
    """Return a round's figures compared with pfl-research, by vocabulary; only the small one if quick.

    Raises:
        MissingExtraError: pfl-research cannot be installed.
        RuntimeError: the two did not train the same adapter; the worker's last line is quoted.
    """
    command = (str(peer_python(*PFL)), "-m", "scripts.benchmarks.cohort_worker", json.dumps(options))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the comparison with pfl-research failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {name: {**figures, "clients": _spreads(figures["clients"])} for name, figures in found.items()}


def _spreads(clients: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Spread]]:
    return {name: {key: Spread(**values) for key, values in costs.items()} for name, costs in clients.items()}


def main(options: Mapping[str, int]) -> None:
    """Compare on every vocabulary and print the figures as one line of JSON."""
    torch.set_num_threads(options["threads"])
    base, figures = open_bench("transformers", options["seed"]).engine.base, {}
    for name in (SMALL,) if options["quick"] else VOCABULARIES:
        cohort = make_cohort(base, VOCABULARIES[name], options["seed"])
        with quiet_huggingface():
            figures[name] = compare(cohort, options["repetitions"])
    print(json.dumps(figures, default=asdict))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
