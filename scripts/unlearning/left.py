"""What an adapter still tells of a client: how likely its canaries are, how many members show, its loss."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from clients.canaries import canary_file
from clients.data_holder import DataHolder
from fedllm.adapters.layout import AdapterState
from fedllm.attacks.canaries import Canary, canary_rows, secret_canaries
from fedllm.attacks.extraction import exposures
from fedllm.attacks.membership import likelihood, min_k_plus_plus, separation
from fedllm.attacks.token_scores import score, whole
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import NoDataError
from fedllm.privacy.keys import kept_secret
from fedllm.runs.records import RoundRecord
from scripts.auditing.rows import trained_rows

EXPOSURE, FOUND, LOSS = "canary exposure", "Min-K%++ found at 1 % FPR", "own held-out loss"
MEASURES = (EXPOSURE, FOUND, LOSS)


def left_of(
    holder: DataHolder, client: str, records: Sequence[RoundRecord], adapters: Sequence[AdapterState]
) -> list[dict[str, float]]:
    """Return all measures of each adapter; `records` are of the run that had the client.

    Exposure is the mean over its included canaries, in bits. Members are its own rows that were trained on,
    against those it held out, which are of the same kind; the loss is that of the latter, in nats per token:
    it says whether the adapter knows that kind of text too well, or by unlearning too badly.

    Raises:
        NoDataError: the client has no canaries, no row that was trained on, or none held out.
    """
    canaries, config = planted(holder, client), holder.plan.config
    tokens = holder.clients[client]
    number = len(tokens.train) - len(canary_rows(canaries))  # canaries come after the client's own rows
    own = replace(tokens, train=tokens.train[:number])
    members, others = trained_rows(own, config, records, canaries), own.held_out
    if not (members and others and any(one.included for one in canaries)):
        raise NoDataError(
            f"client {client}: what is left of it is measured on canaries, rows that were trained on and rows"
            " held out; set audit.canaries and data.held-out-fraction"
        )
    rows = [*members, *others, *(whole(one.tokens) for one in canaries)]
    found = []
    for scores in score(holder.engine, [adapter.vector for adapter in adapters], rows):
        number = len(members) + len(others)
        signals = [min_k_plus_plus(one) for one in scores[:number]]
        losses = [-likelihood(one) for one in scores[number:]]
        exposed = [value for values in exposures(canaries, losses).values() for value in values]
        caught = separation(signals[: len(members)], signals[len(members) :]).caught
        loss = -float(torch.cat([one.log_probs for one in scores[len(members) : number]]).mean())
        found.append({EXPOSURE: fmean(exposed), FOUND: caught, LOSS: loss})
    return found


def planted(holder: DataHolder, client: str) -> tuple[Canary, ...]:
    """Return the canaries that a client of this machine has drawn, with their coins."""
    config = holder.plan.config
    secret = kept_secret(canary_file(holder.state_path, config.run.name))
    tokenizer = holder.resident.tokenizer(holder.files)
    return secret_canaries(config.audit, tokenizer, client_id=client, secret=secret)


def losses_of(holder: DataHolder, adapters: Sequence[AdapterState]) -> list[dict[str, float]]:
    """Return each client's held-out loss under each adapter, in nats per token."""
    held_out = {name: client.held_out for name, client in holder.clients.items() if client.held_out}
    jobs = [EvaluationJob(name, one.vector, rows) for one in adapters for name, rows in held_out.items()]
    found = [evaluation.loss for evaluation in holder.engine.evaluate(jobs)]
    number = len(held_out)
    return [
        dict(zip(held_out, found[begin : begin + number], strict=True))
        for begin in range(0, len(found), number)
    ]
