"""A client's half of the privacy plan: its budget, its secret, its private training.

A client counts what it has given away itself and refuses once its budget is spent, whatever a server asks: a
file in its state folder, written before it answers. A request that comes again, as after a resume, gets the
same noise and so the same answer, and is charged once; any other request is charged anew.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace

from clients.data_holder import ClientTokens, DataHolder
from clients.protect import Protection
from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.jobs import Job, StepNoise
from fedllm.errors import CheckpointError, ConfigError
from fedllm.messages import ClientFailure, TrainRequest
from fedllm.models.chat import Encoded
from fedllm.plan.privacy import PrivacyPlan
from fedllm.plan.run_plan import RunPlan
from fedllm.privacy.keys import derived_key, kept_secret
from fedllm.privacy.ledger import Entry, read_ledger, write_ledger
from fedllm.privacy.noise import SecretStream, coins

ROUNDING = 1e-4  # by which gradients are clipped below C: more than float32 can lose in a norm


def secret_of(holder: DataHolder) -> bytes:
    """Return the noise secret of this node's clients in this run.

    Raises:
        CheckpointError: it cannot be kept.
    """
    return kept_secret(holder.store.folder / "noise-secret")


def check_request(run: RunPlan, request: TrainRequest) -> None:
    """Refuse, before any work, a request whose answer nobody would make private, or the plan did not count.

    Raises:
        ConfigError: the server is to add the noise and names no clip, so it is not a server that does; or it
            asks for another training or for more than the configuration of the run says.
    """
    plan = run.privacy
    if plan is None:
        return
    if plan.is_central and not request.clip > 0:
        raise ConfigError("privacy.trust = 'central' needs a fedllm server, which adds the noise to the sum")
    unplanned = {
        "another training": request.training != run.training(request.round_num),
        "control variates": request.control is not None,
        "a local B": request.local_b,
        "counts of tokens": request.weighting == "tokens",
    }
    if any(unplanned.values()):
        asked = ", ".join(name for name, is_asked in unplanned.items() if is_asked)
        raise ConfigError(f"privacy.epsilon: the plan does not cover what the server asks for: {asked}")


def charge_clients(
    holder: DataHolder, plan: PrivacyPlan, request: TrainRequest, clients: Iterable[str]
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


def _charge(holder: DataHolder, plan: PrivacyPlan, request: TrainRequest, client: ClientTokens) -> bool:
    file = holder.store.folder / client.client_id / "privacy-ledger.json"
    ledger, charge, name = read_ledger(file), plan.charge(len(client.train)), client.client_id
    entry = Entry(request.round_num, 0, request_key(plan, request, client, b"").hex(), {name: charge})
    charged = ledger.with_entry(entry)
    if charged is ledger:
        return True
    if not ledger.affords(name, charge, epsilon=plan.epsilon, delta=plan.delta, planned=plan.planned):
        return False
    write_ledger(file, charged)
    return True


def request_key(plan: PrivacyPlan, request: TrainRequest, client: ClientTokens, secret: bytes) -> bytes:
    """Return the key of all chance in a client's answer to a request: what differs in anything has another.

    What the plan does is part of it: the same noise in two amounts, on what is otherwise the same, cancels.
    """
    protected = (plan.unit, plan.trust, plan.clip, plan.multiplier(len(client.train)), plan.batch_size)
    numbers = json.dumps([protected, asdict(request.training)], sort_keys=True)
    place = request.client_ids.index(client.client_id)
    names = (
        client.client_id,
        client.digest,
        request.round_num,
        request.adapter.digest,
        request.base_delta.digest,
    )
    what = (request.trained, request.returned, request.ranks[place], request.num_drawn[place], request.seed)
    return derived_key(secret, "train", *names, *what, numbers)


def private_job(job: Job, client: ClientTokens, plan: PrivacyPlan, key: bytes) -> Job:
    """Return a job as DP-SGD: rows drawn by coins in every step, clipped one by one, and noised.

    AdamW divides by the size of its gradients, and what it makes of noised ones is post-processing; clipping
    those again would only clip the noise. Dropout is drawn from the secret as well: who knew the masks could
    tell by them which place a row had in its step, and so whether an earlier one was there.
    """
    rate = plan.sampling_rate(len(client.train))
    stream = SecretStream(derived_key(key, "rows"))
    batches = tuple(_drawn(client.train, stream, rate) for _ in job.batches)
    deviation = plan.multiplier(len(client.train)) * plan.clip / plan.batch_size
    return replace(
        job,
        batches=batches,
        training=replace(job.training, batch_size=plan.batch_size, clip_norm=0.0),
        seed=int.from_bytes(derived_key(key, "dropout")[:8], "big") >> 1,
        example_clip=plan.clip * (1 - ROUNDING),
        noise=StepNoise(derived_key(key, "noise"), deviation),
    )


def _drawn(rows: tuple[Encoded, ...], stream: SecretStream, rate: float) -> tuple[Encoded, ...]:
    return tuple(row for row, is_in in zip(rows, coins(stream, len(rows), rate), strict=True) if is_in)


def protection_of(
    holder: DataHolder, plan: PrivacyPlan | None, request: TrainRequest, layout: AdapterLayout
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
