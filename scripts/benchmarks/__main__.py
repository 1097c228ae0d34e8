"""All benchmarks as one command: `python -m scripts.benchmarks NAME [--quick] [--json] ...`."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a look-up would be timed

from scripts.command_line import run_module

BENCHMARKS = {
    "aggregation": "A round's aggregation compared with forming dense matrices.",
    "client": "A client's round compared with those of FlowerTune, TRL and pfl-research.",
    "distillation": "The distillation step compared with a training round.",
    "evaluation": "Choices scored by likelihood compared with lm-evaluation-harness.",
    "private_training": "Gradients per example, as DP-SGD needs them, compared with Opacus.",
    "gpu": "All that is promised of a GPU: steps, clients, rounds, runs, generation.",
    "fused": "Many clients in one pass compared with one after another.",
    "round": "What a whole federated round costs besides its training.",
    "secure": "Bytes and seconds of masked sums of many parties, some of them lost.",
    "secure_round": "A round of sites whose updates are masked, compared with one in the clear.",
    "site": "A round of sites whose model stays loaded, and of ones that load it for each message.",
    "wire": "Bytes, errors and speed of what an update is packed as.",
}
# The names of their reports, in docs/results.
REPORTS = {"bench_dp": "private_training", **{f"bench_{name}": name for name in BENCHMARKS}}

if __name__ == "__main__":
    words = [REPORTS.get(word, word) for word in sys.argv[1:2]] + sys.argv[2:]
    sys.exit(run_module("scripts.benchmarks", BENCHMARKS, words))
