#!/usr/bin/env bash
# Every check of the project: linters, types, import contracts, tests. Words go to pytest.
# One process more than there are cores: many tests wait for processes of their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_project "[test]"
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports
cores="$(python -c "import os; print(min(8, os.cpu_count() or 1))")"
exec pytest -n "$((cores + 1))" --dist worksteal "$@"
