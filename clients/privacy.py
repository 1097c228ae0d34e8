"""A client's half of the privacy plan: its budget, its secret, its private training.

A client counts what it has given away itself and refuses once its budget is spent, whatever a server asks: a
file in its state folder, written when an answer is ready to leave. What is counted is the answer, not the
request. A request that comes again, as after a resume, gets the same noise and so the same bits, which are
charged once; where a machine computes other bits, their noise is unrelated, and they are charged anew.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from clients.data_holder import DataHolder
from clients.site import data_budget
from clients.technique import ClientWork, NodeRound, Technique, Works, failure_of
from clients.tokens import ClientTokens
from fedllm.engine.jobs import Job, StepNoise
from fedllm.errors import BudgetSpentError, CheckpointError, ConfigError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.models.chat import Encoded
from fedllm.models.files import weights_digest
from fedllm.plan.privacy import PrivacyPlan
from fedllm.plan.run_plan import RunPlan
from fedllm.privacy.accounting import Charge
from fedllm.privacy.keys import bits_digest, derived_key, kept_secret
from fedllm.privacy.ledger import Entry, Ledger, change_ledger, read_ledger
from fedllm.privacy.noise import SecretStream, coins

ROUNDING = 1e-4  # by which gradients are clipped below C: more than float32 can lose in a norm


def client_privacy(plan: RunPlan) -> Technique | None:
    """Return the client's part of the privacy plan as a technique, None where the run has no such plan."""
    privacy = plan.privacy
    if privacy is None:
        return None
    if privacy.is_central:  # charged at the server, which adds the noise
        return Technique(name="central noise", prepare=_refuse_without_clip)
    refuse, charge = partial(refuse_spent, privacy), partial(charge_clients, privacy)
    if privacy.is_by_example:
        prepare = partial(_train_privately, privacy)
        return Technique(name="private rows", refuse=refuse, prepare=prepare, charge=charge)
    if privacy.is_distributed:
        return Technique(name="shares of noise", refuse=refuse, prepare=_refuse_unmasked, charge=charge)
    return Technique(name="local noise", refuse=refuse, charge=charge)  # the noise is in `clients.protect`


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


def _refuse_unmasked(this_round: NodeRound, works: Works) -> Works:
    for work in works:
        if work.client.client_id not in this_round.labels:
            raise ConfigError("privacy.trust = 'distributed': a share of noise protects in a secret sum only")
    return works


def secret_of(holder: DataHolder) -> bytes:
    """Return the noise secret of this node's clients in this run.

    Raises:
        CheckpointError: it cannot be kept.
    """
    return kept_secret(holder.store.folder / "noise-secret")


def refuse_spent(plan: PrivacyPlan, this_round: NodeRound, names: Iterable[str]) -> dict[str, ClientFailure]:
    """Return the clients that cannot pay for another answer, before they train for nothing.

    One that has answered in this round already may: the same answer again is free. A share of noise is not,
    since it goes into another sum.
    """

    def check(name: str) -> None:
        holder, file = this_round.holder, _ledger_of(this_round, name)
        client = holder.clients[name]
        ledger, number = read_ledger(file), this_round.request.round_num
        if not plan.is_distributed and any(entry.round_num == number for entry in ledger.entries):
            return
        charge = plan.charge(client.num_rows)
        _check_afforded(plan, ledger, file, name, charge)
        if (budget := data_budget(holder.data_path, holder.state_path)) is not None:
            budget.check(budget.ledger, charge, plan.unit)

    return _failures(check, names)


def charge_clients(plan: PrivacyPlan, this_round: NodeRound, works: Works) -> dict[str, ClientFailure]:
    """Charge each client for the answer that is about to leave it; return those whose answer must stay.

    It is on disk by then. What failed on the way here, a missing device say, has cost nothing; what is not
    recorded must not leave, so a client whose ledger cannot be read or written fails too.
    """
    by_name = {work.client.client_id: work for work in works}
    return _failures(lambda name: _charge(plan, this_round, by_name[name]), by_name)


def _charge(plan: PrivacyPlan, this_round: NodeRound, work: ClientWork) -> None:
    """Record in a client's ledger what leaves it; raises where it cannot be afforded or recorded."""
    client, name = work.client, work.client.client_id
    charge, file = plan.charge(client.num_rows), _ledger_of(this_round, name)
    draw = request_key(this_round, plan, client, b"").hex() if plan.is_by_example else ""
    # The noise of a share follows the sum, so an update that goes into another sum is another release.
    release = release_digest(work.sent, this_round.labels[name].hex() if plan.is_distributed else draw)
    entry = Entry(this_round.request.round_num, 0, release, {name: charge}, draw)
    data = this_round.holder.data_path
    budget = data_budget(data, this_round.holder.state_path)

    def pay(ledger: Ledger) -> Ledger:
        paid = entry
        if draw and any(earlier.draw == draw for earlier in ledger.entries):
            # The same rows as in an earlier answer, whose bits were others: only the first was sampled.
            paid = replace(entry, charges={name: replace(charge, rate=1.0)})
        charged = ledger.with_entry(paid)
        if charged is not ledger:  # the same answer again gives nothing new away
            _check_afforded(plan, ledger, file, name, paid.charges[name])
        if budget is not None and data is not None:  # free there too where this run has paid for it
            budget.pay(replace(paid, run=this_round.holder.store.folder.name), plan.unit, data)
        return charged

    change_ledger(file, pay)


def _check_afforded(plan: PrivacyPlan, ledger: Ledger, file: Path, name: str, charge: Charge) -> None:
    if not ledger.affords(name, charge, epsilon=plan.epsilon, delta=plan.delta, planned=plan.planned):
        raise BudgetSpentError(
            f"client {name}: by its ledger {file} one more answer would exceed privacy.epsilon ="
            f" {plan.epsilon:g}; it sits out"
        )


def _failures(step: Callable[[str], None], names: Iterable[str]) -> dict[str, ClientFailure]:
    failed = {}
    for name in names:
        try:
            step(name)
        except (BudgetSpentError, CheckpointError) as error:
            failed[name] = failure_of(name, error)
    return failed


def _ledger_of(this_round: NodeRound, name: str) -> Path:
    return this_round.holder.store.folder / name / "privacy-ledger.json"


def release_digest(update: ClientUpdate, draw: str = "") -> str:
    """Return the SHA-256 (hex) of what leaves a client: the bits of its delta, its weight and its numbers.

    Seconds are left out: where they leave, the plan says that they have no noise, and they never repeat.
    `draw` names the coins, since training that diverges gives zeros under any of them, and each is a release;
    or the sum that the update goes into.
    """
    numbers = (update.weight, update.num_tokens, update.train_loss, update.num_truncated)
    coins_used = torch.tensor(list(draw.encode()), dtype=torch.uint8)
    return bits_digest(update.delta, torch.tensor(numbers, dtype=torch.float64), coins_used)


def update_key(this_round: NodeRound, client: ClientTokens) -> bytes:
    """Return the key of the noise on a client's whole update, which the update itself completes.

    It names the request: under one noise, equal answers to two requests would tell that what they hide is
    equal, as where a server chose an adapter that has no gradient on a row it guessed. It leaves the machine
    out: the same update of the same request is the same release wherever it was computed.
    """
    names = (client.client_id, client.digest, this_round.holder.plan.digest)
    return derived_key(secret_of(this_round.holder), "request", *names, *_asked(this_round, client.client_id))


def _asked(this_round: NodeRound, name: str) -> tuple[str | int, ...]:
    request = this_round.request
    start = (request.round_num, request.adapter.digest, request.base_delta.digest)
    parts = (this_round.trained, this_round.returned)
    return (*start, *parts, request.ranks[name], request.drawn[name], this_round.seed)


def request_key(this_round: NodeRound, plan: PrivacyPlan, client: ClientTokens, secret: bytes) -> bytes:
    """Return the key of all random draws of a client's answer; any other request has another key.

    So has another plan, model, precision or device, which may round a gradient otherwise: rows drawn by the
    same coins for two answers are sampled once, and both answers are charged as sampled.
    """
    name, holder = client.client_id, this_round.holder
    protected = (plan.unit, plan.trust, plan.clip, plan.multiplier(client.num_rows), plan.batch_size)
    numbers = json.dumps([protected, asdict(this_round.training)], sort_keys=True)
    base = holder.engine.base
    weights = weights_digest(base.files.folder)  # all of them: a fingerprint reads samples
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else str(base.device)
    # The digest of the plan leaves device and threads free.
    machine = (holder.plan.digest, device, torch.get_num_threads(), str(base.dtype), weights)
    return derived_key(secret, "train", name, client.digest, *_asked(this_round, name), numbers, *machine)


def private_job(job: Job, client: ClientTokens, plan: PrivacyPlan, key: bytes) -> Job:
    """Return a job as DP-SGD: rows drawn by coins in every step, clipped one by one, and noised.

    AdamW divides by the size of its gradients, and what it makes of noised ones is post-processing; clipping
    those again would only clip the noise. Dropout is drawn from the secret as well: who knew the masks could
    tell by them which place a row had in its step, and so whether an earlier one was there.
    """
    rate = plan.sampling_rate(client.num_rows)
    stream = SecretStream(derived_key(key, "rows"))
    batches = tuple(_drawn(client.train, stream, rate) for _ in job.batches)
    deviation = plan.multiplier(client.num_rows) * plan.clip / plan.batch_size  # of the mean over a batch
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
