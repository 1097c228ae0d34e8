"""What the sites of a run have consented to: its purpose, and which rows, by commitments they signed."""

import hashlib
from collections.abc import Mapping
from typing import Any

from fedllm.messages import JoinedClient
from fedllm.plan.run_plan import RunPlan
from fedllm.wire.joining import consent_statement


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
