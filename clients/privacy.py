"""A client's half of the privacy plan: its budget, its secret, its private training.

A client counts what it has given away itself and refuses once its budget is spent, whatever a server asks: a
file in its state folder, written before it answers. A request that comes again, as after a resume, gets the
same noise and so the same answer, and is charged once; any other request is charged anew.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from clients.holder import ClientTokens, Holder
from clients.protect import Protection
from fedllm.adapters.layout import AdapterLayout
from fedllm.errors import CheckpointError, ConfigError, FedLLMError
from fedllm.models.chat import Encoded
from fedllm.privacy.keys import derived_key, kept_secret
from fedllm.privacy.ledger import Entry, Ledger, ledger_from_dict, ledger_to_dict
from fedllm.privacy.noise import SecretStream, coins
from fedllm.privacy.plan import PrivacyPlan
from fedllm.runs.atomic import write_file
from fedllm.training.jobs import Job, StepNoise
from fedllm.types import ClientFailure, TrainRequest

ROUNDING = 1e-4  # by which gradients are clipped below C: more than float32 can lose in a norm


def secret_of(holder: Holder) -> bytes:
    """Return the noise secret of this node's clients in this run.

    Raises:
        CheckpointError: it cannot be kept.
    """
    return kept_secret(holder.store.folder / "noise-secret")


def check_request(plan: PrivacyPlan | None, request: TrainRequest) -> None:
    """Refuse, before any work, a request whose answer nobody would make private.

    Raises:
        ConfigError: the server is to add the noise and names no clip, so it is not a server that does.
    """
    if plan is not None and plan.is_central and not request.clip > 0:
        raise ConfigError("privacy.trust = 'central' needs a fedllm server, which adds the noise to the sum")


def charge_clients(
    holder: Holder, plan: PrivacyPlan, request: TrainRequest, clients: Iterable[str]
) -> dict[str, ClientFailure]:
    """Charge each client for its answer to a request; return those that cannot afford or record it."""
    failed = {}
    for name in clients:
        try:
            is_charged = _charge(holder, plan, request, holder.clients[name])
        except CheckpointError as error:
            failed[name] = ClientFailure(client_id=name, code=error.code)
            continue
        if not is_charged:
            failed[name] = ClientFailure(client_id=name, code="budget-spent")
    return failed


def _charge(holder: Holder, plan: PrivacyPlan, request: TrainRequest, client: ClientTokens) -> bool:
    file = holder.store.folder / client.client_id / "privacy-ledger.json"
    ledger, charge = _read(file), plan.charge(len(client.train))
    entry = Entry(request.round_num, 0, request_key(request, client, b"").hex(), {client.client_id: charge})
    charged = ledger.with_entry(entry)
    if charged is ledger:
        return True
    planned = 0 if plan.noise_multiplier else plan.participations * plan.steps
    budget = {"epsilon": plan.epsilon, "delta": plan.delta, "planned": planned}
    if not ledger.affords(client.client_id, charge, **budget):  # type: ignore[arg-type]
        return False
    try:
        write_file(file, json.dumps(ledger_to_dict(charged)) + "\n")
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    return True


def _read(file: Path) -> Ledger:
    """Return a client's ledger; a damaged one is no reason to start from nothing.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return ledger_from_dict(json.loads(file.read_text())) if file.exists() else Ledger()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FedLLMError):
        raise CheckpointError(f"{file} is damaged; what was spent is not known: restore it") from None


def request_key(request: TrainRequest, client: ClientTokens, secret: bytes) -> bytes:
    """Return the key of all chance in a client's answer to a request: other requests or rows, another key."""
    numbers = json.dumps(asdict(request.training), sort_keys=True)
    rank = request.ranks[request.client_ids.index(client.client_id)]
    names = (client.client_id, client.digest, request.round_num, request.adapter.digest, request.drift.digest)
    return derived_key(secret, "train", *names, request.trained, rank, request.seed, numbers)


def private_job(job: Job, client: ClientTokens, plan: PrivacyPlan, key: bytes) -> Job:
    """Return a job as DP-SGD: rows drawn by coins in every step, clipped one by one, and noised.

    AdamW divides by the size of its gradients, and what it makes of noised ones is post-processing; clipping
    those again would only clip the noise.
    """
    rate = plan.sampling_rate(len(client.train))
    stream = SecretStream(derived_key(key, "rows"))
    batches = tuple(_drawn(client.train, stream, rate) for _ in job.batches)
    deviation = plan.multiplier(len(client.train)) * plan.clip / plan.batch_size
    return replace(
        job,
        batches=batches,
        training=replace(job.training, batch_size=plan.batch_size, clip_norm=0.0),
        example_clip=plan.clip * (1 - ROUNDING),
        noise=StepNoise(derived_key(key, "noise"), deviation),
    )


def _drawn(rows: tuple[Encoded, ...], stream: SecretStream, rate: float) -> tuple[Encoded, ...]:
    return tuple(row for row, is_in in zip(rows, coins(stream, len(rows), rate), strict=True) if is_in)


def protection_of(
    holder: Holder, plan: PrivacyPlan | None, request: TrainRequest, layout: AdapterLayout
) -> Protection | None:
    """Return what the plan asks of what a client sends."""
    if plan is None:
        return None
    clip = request.clip if plan.is_central else plan.clip
    return Protection(
        layout=layout,
        part=request.returned,
        clip=0.0 if plan.is_by_example else clip,
        deviation=plan.multiplier() * plan.clip if plan.is_local_client else 0.0,
        key=secret_of(holder) if plan.is_local_client else b"",
        weight_cap=plan.weight_cap,
        with_numbers=plan.metrics == "all",
    )
