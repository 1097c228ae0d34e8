"""Canaries of an audited run: texts of random tokens that a client adds to its training rows, or leaves out.

A fair coin decides for each of them, drawn from a secret of this machine. Neither coins nor texts leave it;
the number of training rows a client declares includes the canaries among them. `fedllm audit` reads the
secret again.
"""

from pathlib import Path
from typing import Any

from fedllm.attacks.canaries import canary_rows, secret_canaries
from fedllm.config.run_config import RunConfig
from fedllm.models.chat import Encoded
from fedllm.plan.dealt_numbers import parse_canaries
from fedllm.privacy.keys import kept_secret


def canary_file(state_path: Path, run_name: str) -> Path:
    """Return where the secret of a run's canaries lies, with mode 0600."""
    return state_path / f"{run_name}-canary-secret"


def draw_canaries(config: RunConfig, tokenizer: Any, client_id: str, state_path: Path) -> tuple[Encoded, ...]:
    """Return the rows that a client of this node adds to its own; none unless the run plants canaries.

    Raises:
        CheckpointError: the secret cannot be kept.
    """
    if not parse_canaries(config.audit.canaries)[0]:
        return ()  # before the secret: a run without canaries leaves none behind
    secret = kept_secret(canary_file(state_path, config.run.name))
    return canary_rows(secret_canaries(config.audit, tokenizer, client_id=client_id, secret=secret))
