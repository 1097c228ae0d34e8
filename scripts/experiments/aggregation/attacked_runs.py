"""Runs where some clients are malicious: in the changes they send, the rows they train on, or both.

Malicious clients are the last ones by name. Their rows are poisoned in a file of the trial's own, which the
run reads as it reads any. Their changes are replaced between training and sending, where a malicious client's
own code would stand; from there on everything is the product: message, validation, rule, read-out. With the
option `validated` false the server's bound on honest moves is taken away too, to see a rule by itself.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

import numpy as np
import torch

from clients import client_app
from clients.data_holder import DataHolder, hosted_rows
from clients.process import Process
from clients.train import train_clients
from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example, Turn
from fedllm.data.partition import partition_rows
from fedllm.data.rows import read_local_rows
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.engine.optimizer import largest_move
from fedllm.messages import ClientFailure, ClientUpdate, TrainRequest
from fedllm.models.chat import Encoded, encode
from fedllm.seeds import derive_seed
from scripts.experiments.aggregation import attacks
from scripts.experiments.corpus import Row, row_of, write_rows
from scripts.experiments.runs import figures_of, run
from scripts.experiments.trials import Figures, Setting, Trial
from strategies.exchange import receiving

HUGE = 1e6
LABELS, BACKDOOR = "labels", "backdoor"

# (change [P], the furthest an honest value can move, randomness) -> what is sent
UpdateAttack: TypeAlias = Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]

UPDATE_ATTACKS: dict[str, UpdateAttack] = {
    "huge flip": lambda delta, bound, generator: attacks.scaled(attacks.sign_flip(delta), HUGE),
    "flip within bound": lambda delta, bound, generator: attacks.within(attacks.sign_flip(delta), bound),
    "flip at bound": lambda delta, bound, generator: attacks.at_bound(attacks.sign_flip(delta), bound),
    "noise within bound": lambda delta, bound, generator: attacks.within(
        attacks.gaussian(delta, 1.0, generator), bound
    ),
    "boost within bound": lambda delta, bound, generator: attacks.within(delta, bound),
}


def attacked(trial: Trial, setting: Setting) -> Figures:
    """Do a run under attack and return its figures, with the success of a backdoor where one was planted.

    Options: `malicious` clients; `updates`, a name in `UPDATE_ATTACKS` or none; `validated`; `rows`, "labels"
    or "backdoor" or none, and for a backdoor `share` of the rows, `trigger`, `target` and `probes`.
    """
    options = trial.options
    with tempfile.TemporaryDirectory() as folder:
        dealt = deal(setting.config(trial), Path(setting.rows_file))
        attackers = attackers_of(dealt, int(options["malicious"]))
        file = write_rows(Path(folder) / "rows.jsonl", poisoned(dealt, attackers, trial))
        config = setting.config(trial, {"data.source": str(file), "data.partition": "column:owner"})
        name = str(options.get("updates", ""))
        unguarded = nullcontext() if options.get("validated", True) else unbounded()
        with unguarded, attacked_updates(attackers, UPDATE_ATTACKS[name]) if name else nullcontext():
            state = run(config)
        figures = {**figures_of(state.records), "attackers": list(attackers)}
        if options.get("rows") == BACKDOOR:
            adapters = {"before": state.session.initial, "after": state.adapter}
            figures["backdoor"] = backdoor_success(config, trial, attackers, adapters)
    return figures


# --- rows ---------------------------------------------------------------------------------------------------


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


# --- changes ------------------------------------------------------------------------------------------------


@contextmanager
def attacked_updates(attackers: Collection[str], attack: UpdateAttack) -> Iterator[None]:
    """Let the attackers' changes pass through `attack` between training and sending."""
    honest = train_clients

    def train(holder: DataHolder, request: TrainRequest) -> list[ClientUpdate | ClientFailure]:
        bound = largest_move(
            holder.plan.training(request.round_num), float(request.adapter.vector.abs().max())
        )

        def sent(answer: ClientUpdate | ClientFailure) -> ClientUpdate | ClientFailure:
            if isinstance(answer, ClientFailure) or answer.client_id not in attackers:
                return answer
            stream = derive_seed(holder.plan.config.seed, "attack", answer.client_id, request.round_num)
            generator = torch.Generator().manual_seed(stream)
            return replace(answer, delta=attack(answer.delta, bound, generator))

        return [sent(answer) for answer in honest(holder, request)]

    with patch.object(client_app, "train_clients", train):
        yield


@contextmanager
def unbounded() -> Iterator[None]:
    """Take away the server's bound on how far an honest value can move."""
    with patch.object(receiving, "largest_move", lambda *_: math.inf):
        yield


# --- backdoor -----------------------------------------------------------------------------------------------


def backdoor_success(
    config: RunConfig, trial: Trial, attackers: Collection[str], adapters: dict[str, AdapterState]
) -> Figures:
    """Return per adapter how often a trigger works on held-out questions of honest clients.

    `answered` is the share whose greedy answer begins with the target, `untriggered` that of the same
    questions without the trigger; `preferred` the share where the target has a lower loss per token than the
    true answer; `target_loss` and `answer_loss` are those losses' means.
    """
    trigger, target = str(trial.options["trigger"]), str(trial.options["target"])
    clients = config.federation.num_clients
    node = {"partition-id": 0, "num-partitions": clients, "server-paths": True}  # as the run's first node
    engine = Process().open(config.to_flat(), node).engine
    probes: list[_Probe] = []
    for client in hosted_rows(config, {}):
        for example in client.held_out if client.client_id not in attackers else ():
            rows = [
                encode(
                    attacks.with_trigger(example, trigger, text),
                    engine.base.tokenizer,
                    config.train.max_length,
                )
                for text in (target, example.turns[-1].content)
            ]
            if rows[0] is not None and rows[1] is not None and not rows[0].num_cut:
                probes.append(_Probe(example.turns[-2].content, rows[0], rows[1]))
    number = min(len(probes), int(trial.options["probes"]))
    probes = [probes[index * len(probes) // number] for index in range(number)]  # spread over the clients
    return {
        "probes": number,
        **{name: _success(engine, adapter, probes, trigger, target) for name, adapter in adapters.items()},
    }


@dataclass(frozen=True)
class _Probe:
    """A question, and the rows of it with the trigger and the target, or its true answer."""

    question: str
    target: Encoded
    answer: Encoded


def _success(
    engine: Engine, adapter: AdapterState, probes: Sequence[_Probe], trigger: str, target: str
) -> Figures:
    questions = [probe.question for probe in probes]
    asked = [f"{question} {trigger}" for question in questions] + questions
    length = max(probe.target.num_supervised for probe in probes)
    hits = [text.startswith(target) for text in engine.generate([adapter] * len(asked), asked, length)]
    jobs = [
        EvaluationJob(str(place), adapter.vector, (row,))
        for place, row in enumerate(row for probe in probes for row in (probe.target, probe.answer))
    ]
    losses = [done.loss for done in engine.evaluate(jobs)]
    targets, others = losses[::2], losses[1::2]
    number = len(probes)
    return {
        "answered": sum(hits[:number]) / number,
        "untriggered": sum(hits[number:]) / number,
        "preferred": sum(bad < good for bad, good in zip(targets, others, strict=True)) / number,
        "target_loss": sum(targets) / number,
        "answer_loss": sum(others) / number,
    }
