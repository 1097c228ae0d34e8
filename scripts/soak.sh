#!/usr/bin/env bash
# The long faults alone: dozens of kills, rounds that lose a third of their clients. Words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_project "[test]"
exec .venv/bin/python -m pytest -m soak "$@"
