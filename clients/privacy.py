"""A client's half of the privacy plan: its budget, its secret, its private training.

A client counts what it has given away itself and refuses once its budget is spent, whatever a server asks: a
file in its state folder, written before it answers. A request that comes again, as after a resume, gets the
same noise and so the same answer, and is charged once; any other request is charged anew.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial

from clients.data_holder import DataHolder
from clients.technique import NodeRound, Technique, Works, failure_of
from clients.tokens import ClientTokens
from fedllm.engine.jobs import Job, StepNoise
from fedllm.errors import BudgetSpentError, CheckpointError, ConfigError
from fedllm.messages import ClientFailure
from fedllm.models.chat import Encoded
from fedllm.plan.privacy import PrivacyPlan
from fedllm.plan.run_plan import RunPlan
from fedllm.privacy.keys import derived_key, kept_secret
from fedllm.privacy.ledger import Entry, read_ledger, write_ledger
from fedllm.privacy.noise import SecretStream, coins

ROUNDING = 1e-4  # by which gradients are clipped below C: more than float32 can lose in a norm


def client_privacy(plan: RunPlan) -> Technique | None:
    """Return the client's part of the privacy plan as a technique, None where the run has no such plan."""
    privacy = plan.privacy
    if privacy is None:
        return None
    if privacy.is_central:  # charged at the server, which adds the noise
        return Technique(name="central noise", prepare=_refuse_without_clip)
    charge = partial(charge_clients, privacy)
    if privacy.is_by_example:
        return Technique(name="private rows", charge=charge, prepare=partial(_train_privately, privacy))
    return Technique(name="local noise", charge=charge)  # the noise itself is in `clients.protect`


def _train_privately(plan: PrivacyPlan, this_round: NodeRound, works: Works) -> Works:
    secret, private = secret_of(this_round.holder), []
    for work in works:
        key = request_key(this_round, plan, work.client, secret)
        private.append(replace(work, job=private_job(work.job, work.client, plan, key)))
    return private


def _refuse_without_clip(this_round: NodeRound, works: Works) -> Works:
    if not this_round.request.clip > 0:  # only a server that noises the sum names the clip it counts on
        raise ConfigError("privacy.trust = 'central' needs a fedllm server, which adds the noise to the sum")
    return works


def secret_of(holder: DataHolder) -> bytes:
    """Return the noise secret of this node's clients in this run.

    Raises:
        CheckpointError: it cannot be kept.
    """
    return kept_secret(holder.store.folder / "noise-secret")


def charge_clients(
    plan: PrivacyPlan, this_round: NodeRound, clients: Iterable[str]
) -> dict[str, ClientFailure]:
    """Charge each client for its answer to a request; return those that cannot pay.

    A client whose ledger cannot be read or written fails too: what is not recorded must not leave.
    """
    failed = {}
    for name in clients:
        try:
            _charge(this_round, plan, this_round.holder.clients[name])
        except (BudgetSpentError, CheckpointError) as error:
            failed[name] = failure_of(name, error)
    return failed


def _charge(this_round: NodeRound, plan: PrivacyPlan, client: ClientTokens) -> None:
    """Record a client's answer in its ledger; raises where it cannot be afforded or recorded."""
    file = this_round.holder.store.folder / client.client_id / "privacy-ledger.json"
    ledger, charge, name = read_ledger(file), plan.charge(len(client.train)), client.client_id
    run, request = this_round.holder.plan, request_key(this_round, plan, client, b"").hex()
    # Any key of the run may change how the answer is rounded, and so its noise: that is another answer.
    machine = (run.config.model.device, str(run.config.model.num_threads))  # the digest leaves them free
    answer = derived_key(b"", "answer", run.digest, *machine, request)  # only a name, so no secret
    charged = ledger.with_entry(Entry(this_round.request.round_num, 0, answer.hex(), {name: charge}))
    if charged is ledger:  # the same answer again gives nothing new away
        return
    if not ledger.affords(name, charge, epsilon=plan.epsilon, delta=plan.delta, planned=plan.planned):
        raise BudgetSpentError(
            f"client {name}: by its ledger {file} one more answer would exceed privacy.epsilon ="
            f" {plan.epsilon:g}; it sits out"
        )
    write_ledger(file, charged)


def request_key(this_round: NodeRound, plan: PrivacyPlan, client: ClientTokens, secret: bytes) -> bytes:
    """Return the key of all random draws of a client's answer; any other request has another key.

    Another plan or another precision of the base model gives another key too: of two answers with the same
    noise, on nearly the same gradients, the difference would have none.
    """
    request, name = this_round.request, client.client_id
    protected = (plan.unit, plan.trust, plan.clip, plan.multiplier(len(client.train)), plan.batch_size)
    numbers = json.dumps([protected, asdict(this_round.training)], sort_keys=True)
    start = (request.round_num, request.adapter.digest, request.base_delta.digest)
    what: tuple[str | int, ...] = (
        this_round.trained,
        this_round.returned,
        request.ranks[name],
        request.drawn[name],
        this_round.seed,
    )
    base, quantization = this_round.holder.engine.base, this_round.holder.plan.config.model.quantization
    precision = (str(base.dtype), quantization)
    # The usual one adds nothing, so that runs under way keep their noise.
    what += () if precision == ("torch.float32", "none") else precision
    return derived_key(secret, "train", name, client.digest, *start, *what, numbers)


def private_job(job: Job, client: ClientTokens, plan: PrivacyPlan, key: bytes) -> Job:
    """Return a job as DP-SGD: rows drawn by coins in every step, clipped one by one, and noised.

    AdamW divides by the size of its gradients, and what it makes of noised ones is post-processing; clipping
    those again would only clip the noise. Dropout is drawn from the secret as well: who knew the masks could
    tell by them which place a row had in its step, and so whether an earlier one was there.
    """
    rate = plan.sampling_rate(len(client.train))
    stream = SecretStream(derived_key(key, "rows"))
    batches = tuple(_drawn(client.train, stream, rate) for _ in job.batches)
    deviation = plan.multiplier(len(client.train)) * plan.clip / plan.batch_size  # of the mean over a batch
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
