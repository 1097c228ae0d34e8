#!/usr/bin/env bash
# Every check of the project: linters, types, import contracts, tests, one process a core. Words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_project "[test]"
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports
exec pytest -n auto --maxprocesses 8 --dist worksteal "$@"
