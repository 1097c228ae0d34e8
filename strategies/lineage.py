"""The lineage of a run that has ended, with what its sites consented to: its purpose, and which rows."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.messages import JoinedClient
from fedllm.models.files import ModelFiles
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.lineage import write_lineage
from fedllm.wire.joining import consent_statement


def keep_lineage(
    folder: Path,
    plan: RunPlan,
    files: ModelFiles,
    state: ServerState,
    joined: Mapping[str, JoinedClient],
    bundle: str,
) -> None:
    """Write `lineage.json` of a run; `bundle` is the digest of the code that was shipped to its clients."""
    consent, number = consent_of(plan, joined), len(state.num_drawn)
    write_lineage(folder, plan, files, bundle=bundle, num_clients=number, consent=consent)


def consent_of(plan: RunPlan, joined: Mapping[str, JoinedClient]) -> dict[str, Any]:
    """Return what a run's folder keeps of the consent to it, for every client that joined.

    `consent` is the SHA-256 of what the site signed, with its signature; "" where the site has no key. Names
    of clients and sites are for the server: what it publishes has `commitment` and `consent` alone.
    """
    run = plan.config.run
    return {
        "purpose": run.purpose,
        "clients": {
            name: {
                "site": client.identity,
                "commitment": client.commitment,
                "consent": hashlib.sha256(
                    consent_statement(run.name, plan.digest, run.purpose, client) + client.consent
                ).hexdigest()
                if client.consent
                else "",
            }
            for name, client in sorted(joined.items())
        },
    }
