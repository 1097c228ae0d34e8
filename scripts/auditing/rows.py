"""Which rows and canaries of its clients a run trained on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clients.canaries import canary_file
from clients.data_holder import DataHolder
from clients.tokens import ClientTokens
from fedllm.attacks.canaries import Canary, canary_rows, secret_canaries
from fedllm.config.run_config import RunConfig
from fedllm.data.shards import draw_rows
from fedllm.errors import NoDataError
from fedllm.models.chat import Encoded
from fedllm.plan.dealt_numbers import parse_canaries
from fedllm.plan.run_plan import resolve
from fedllm.privacy.keys import kept_secret
from fedllm.runs.records import RoundRecord
from fedllm.seeds import derive_seed


def sampled(rows: Sequence[Encoded], number: int, seed: int, name: str) -> tuple[Encoded, ...]:
    """Return `number` rows at most in a random order of their own."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "audit", name)))
    return tuple(rows[index] for index in generator.permutation(len(rows))[:number])


def planted_canaries(folder: Path, config: RunConfig, holder: DataHolder) -> tuple[Canary, ...]:
    """Return the canaries of all clients, with their coins.

    Raises:
        NoDataError: the secret they were drawn from is not on this machine.
    """
    if not parse_canaries(config.audit.canaries)[0]:
        return ()
    file = canary_file(folder / "private", config.run.name)
    if not file.exists():  # a new secret would have other coins
        raise NoDataError(f"{file}: the secret of the run's canaries is not there; audit where it was kept")
    secret, tokenizer = kept_secret(file), holder.resident.tokenizer(holder.files)
    return tuple(
        canary
        for name in holder.clients
        for canary in secret_canaries(config.audit, tokenizer, client_id=name, secret=secret)
    )


def trained_rows(
    client: ClientTokens,
    config: RunConfig,
    records: Sequence[RoundRecord],
    canaries: Sequence[Canary] = (),
) -> list[Encoded]:
    """Return which of a client's own rows were trained on, as far as can be told.

    DP-SGD draws rows by secret coins, so there every row of a client that took part counts as trained on.
    """
    number = sum(client.client_id in record.accepted for record in records)
    if not number:
        return []
    plan = resolve(config).privacy
    if plan is not None and plan.is_by_example:
        return list(client.train)
    drawn = draw_rows(
        len(client.train) + len(canary_rows(canaries)),
        seed=config.seed,
        client_id=client.client_id,
        start=0,
        count=number * config.train.local_steps * config.train.batch_size,
    )
    return [client.train[index] for index in sorted(set(drawn)) if index < len(client.train)]
