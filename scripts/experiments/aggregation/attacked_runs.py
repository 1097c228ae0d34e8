"""Runs where some clients are malicious: in the changes they send, the rows they train on, or both.

Malicious clients are the last ones by name. Their rows are poisoned in a file of the trial's own, which the
run reads as it reads any. Their changes are replaced between training and sending, where a malicious client's
own code would stand; from there on everything is the product: message, validation, rule, read-out. With the
option `validated` false the server's bound on honest moves is taken away too, to see a rule by itself.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

import torch

from clients import handlers
from clients.data_holder import DataHolder
from clients.train import train_clients
from fedllm.engine.optimizer import largest_move
from fedllm.messages import ClientFailure, ClientUpdate, TrainRequest
from fedllm.seeds import derive_seed
from scripts.experiments.aggregation import attacks
from scripts.experiments.aggregation.backdoor import backdoor_success
from scripts.experiments.aggregation.poisoned_rows import BACKDOOR, attackers_of, deal, poisoned
from scripts.experiments.corpus import write_rows
from scripts.experiments.runs import figures_of, run
from scripts.studies.trials import Figures, Setting, Trial
from strategies.exchange import receiving

HUGE = 1e6

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
        dealt = deal(setting.config(trial), Path(setting.source))
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

    with patch.object(handlers, "train_clients", train):
        yield


@contextmanager
def unbounded() -> Iterator[None]:
    """Take away the server's bound on how far an honest value can move."""
    with patch.object(receiving, "largest_move", lambda *_: math.inf):
        yield
