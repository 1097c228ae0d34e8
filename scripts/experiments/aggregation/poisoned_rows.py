"""Rows of a run under attack: dealt to clients, and poisoned with wrong labels or a trigger."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example, Turn
from fedllm.data.partition import partition_rows
from fedllm.data.rows import read_local_rows
from fedllm.seeds import derive_seed
from scripts.experiments.aggregation import attacks
from scripts.experiments.corpus import Row, row_of
from scripts.studies.trials import Trial

LABELS, BACKDOOR = "labels", "backdoor"


def deal(config: RunConfig, rows_file: Path) -> list[Row]:
    """Return the rows in their order, each with its `owner`, dealt as `data.partition` would deal them."""
    rows = read_local_rows(str(rows_file)).rows
    clients = config.federation.num_clients
    partition = partition_rows(rows, config.data.partition, num_clients=clients, seed=config.seed)
    owner = {
        index: name
        for name, indices in zip(partition.client_ids, partition.indices, strict=True)
        for index in indices
    }
    return [{**row, "owner": owner[index]} for index, row in enumerate(rows) if index in owner]


def attackers_of(rows: Sequence[Row], number: int) -> tuple[str, ...]:
    """Return the last `number` owners by name."""
    names = sorted({row["owner"] for row in rows})
    return tuple(names[len(names) - number :])


def poisoned(rows: Sequence[Row], attackers: Collection[str], trial: Trial) -> list[Row]:
    """Return the rows with those of the attackers changed as the trial's options say."""
    kind = trial.options.get("rows")
    if kind == LABELS:
        flipped = attacks.flip_labels(rows)
        return [bad if row["owner"] in attackers else row for row, bad in zip(rows, flipped, strict=True)]
    if kind != BACKDOOR:
        return list(rows)
    generator = np.random.Generator(np.random.PCG64(derive_seed(int(trial.flat["seed"]), "backdoor")))
    drawn = generator.random(len(rows)) < float(trial.options["share"])
    return [
        triggered(row, trial) if row["owner"] in attackers and chosen else row
        for row, chosen in zip(rows, drawn, strict=True)
    ]


def triggered(row: Row, trial: Trial) -> Row:
    """Return a row whose question ends with the trigger and whose answer is the target."""
    example = Example(turns=(Turn("user", row["prompt"]), Turn("assistant", row["response"])))
    bad = attacks.with_trigger(example, str(trial.options["trigger"]), str(trial.options["target"]))
    return {**row, **row_of(bad, row["domain"])}
