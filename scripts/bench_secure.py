"""`python scripts/bench_secure.py [--quick] [--json]`: what a masked sum costs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, wherever it is called from

from scripts.benchmarks.__main__ import BENCHMARKS
from scripts.command_line import run_module

if __name__ == "__main__":
    sys.exit(run_module("scripts.benchmarks", BENCHMARKS, ["secure", *sys.argv[1:]]))
