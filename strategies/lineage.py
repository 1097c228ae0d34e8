"""The lineage of a run, with what its sites consented to: its purpose, and which rows."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fedllm.messages import JoinedClient
from fedllm.models.files import ModelFiles
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.lineage import note_clients, write_lineage
from fedllm.wire.joining import consent_statement
from strategies.session import Watch


def noting_clients(folder: Path, plan: RunPlan, watch: Watch) -> Watch:
    """Return a watch that notes in the run's folder who joins, before they are asked to train."""

    def first(tell: Callable[[Mapping[str, JoinedClient]], None]) -> Callable[..., None]:
        def both(clients: Mapping[str, JoinedClient]) -> None:
            try:
                note_clients(folder, consents_of(plan, clients))
            except OSError as error:  # who is still there at the end is noted then
                watch.notice(f"{folder}: {error.strerror}; who has joined is not noted yet")
            tell(clients)

        return both

    return replace(watch, joined=first(watch.joined), joined_later=first(watch.joined_later))


def keep_lineage(
    folder: Path,
    plan: RunPlan,
    files: ModelFiles,
    state: ServerState,
    joined: Mapping[str, JoinedClient],
    bundle: str,
) -> None:
    """Complete `lineage.json` of a run; `bundle` is the digest of the code shipped to its clients."""
    note_clients(folder, consents_of(plan, joined))
    write_lineage(folder, plan, files, num_clients=len(state.num_drawn), bundle=bundle)


def consents_of(plan: RunPlan, joined: Mapping[str, JoinedClient]) -> dict[str, dict[str, str]]:
    """Return what a run's folder keeps of the consent to it, for every client that joined.

    `consent` is the SHA-256 of what the site signed, with its signature; "" where the site has no key. Names
    of clients and sites are for the server: what it publishes has `commitment` and `consent` alone.
    """
    run, found = plan.config.run, {}
    for name, client in joined.items():
        signed = consent_statement(run.name, plan.digest, run.purpose, client) + client.consent
        found[name] = {
            "site": client.identity,
            "commitment": client.commitment,
            "consent": hashlib.sha256(signed).hexdigest() if client.consent else "",
        }
    return found
