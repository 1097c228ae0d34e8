"""All experiments as one command: `python -m scripts.experiments NAME [--quick] [--json] ...`."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no trial asks the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every process

from scripts.command_line import run_module

EXPERIMENTS = {
    "aggregation": "Aggregation methods, the error of averaging factors, malicious clients.",
    "distillation": "What distilling the clients' ensemble gains, by teacher and text.",
    "forgetting": "What each class of unlearning leaves of a client, and what it costs.",
    "joining": "Whom a federation helps more than training alone, and steps at home after it.",
    "pipeline": "An adapter in use over three arrivals of rows: trigger, gates, drift, rollback.",
    "privacy": "Utility and membership attacks over epsilon, by preset.",
    "small_model": "Make the small language model of the experiments.",
    "same_bits": "Whether two versions of this project train the same adapters, bit for bit.",
    "unlearning": "What it costs to forget a client with the same bits, against training again without it.",
}

if __name__ == "__main__":
    sys.exit(run_module("scripts.experiments", EXPERIMENTS, sys.argv[1:]))
