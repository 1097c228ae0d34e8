#!/usr/bin/env bash
# Everything that the project promises of a GPU, in under 8 minutes: one table, and one JSON object as the last line.
# Needs no network. Without the embedded model it uses a random one of its size. Words go to the benchmark:
#   bash scripts/bench_gpu.sh --quick        # a tiny model and little work, also on a CPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec "$python" -m scripts.benchmarks gpu --threads "$(nproc)" --json "$@"
