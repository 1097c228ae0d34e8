#!/usr/bin/env bash
# Eight data holders fine-tune a language model together, on this machine, without network or account.
# Words after the command go to `fedllm run`, for example: bash scripts/demo.sh federation.num-rounds=5
# After an interrupt the same command goes on; run.name=another starts a new run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_project ""
exec .venv/bin/fedllm run run.name=demo --resume "$@"
