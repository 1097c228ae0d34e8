"""What each method of a study does with a run's configuration: the kinds of its trials.

All may spend the same number of steps of each client, and each keeps the best of a few numbers of them, none
among these: its own best. The rows that choose it are not those that measure it. What all the steps would
have given is measured as well, as `last`: the comparison at equal tokens.

base         the model as it is
alone        every client for itself from the same initial adapter; each chooses its own number of steps
centralised  one adapter on all clients' rows, in the batches that a federation would draw
federated    the product's own run; `home` steps at the end are each client's own, from the shared adapter, at
             the best of `home_rates`: a client alone wants smaller steps than a mean of many
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TypeAlias

import torch

from clients.at_home import AtHome, step_counts, train_at_home
from fedllm.adapters.base_delta import BaseDelta, no_base_delta
from fedllm.config.run_config import RunConfig
from fedllm.data.shards import draw_rows
from fedllm.engine.jobs import Job
from fedllm.errors import DivergedError
from fedllm.messages import LocalTraining
from fedllm.models.with_base_delta import with_base_delta
from fedllm.plan.run_plan import resolve
from scripts.runtimes.local import LocalState, init, step
from scripts.runtimes.machine import least_nodes
from scripts.studies.held_out import Clients, Rows, finite_mean, losses, losses_on_others, open_clients
from scripts.studies.trials import Figures, Kinds, Setting, Trial

Shared: TypeAlias = tuple[torch.Tensor, BaseDelta]  # an adapter [P], and what was added to the base model


def base(trial: Trial, setting: Setting) -> Figures:
    """Measure the model before any training."""
    clients = open_clients(setting.config(trial))
    return {**_best_of(clients, {0: _initial(clients)}), "tokens": 0}


def alone(trial: Trial, setting: Setting) -> Figures:
    """Train every client alone, for as many steps as the option `steps` says."""
    config = setting.config(trial)
    clients, steps = open_clients(config), int(trial.options["steps"])
    start, _ = _initial(clients)
    own = _train_own(clients, config, start, steps, {})
    return {**_own(clients, own), "tokens": _tokens(clients, config, steps, {})}


def centralised(trial: Trial, setting: Setting) -> Figures:
    """Train one adapter on the rows that all clients would draw in as many steps as the option says."""
    config = setting.config(trial)
    clients = open_clients(config)
    start, nothing_added = _initial(clients)
    size = config.train.batch_size * resolve(config).cohort.size
    rows = pooled_rows(clients, config, int(trial.options["steps"]))
    batches = tuple(rows[begin : begin + size] for begin in range(0, max(1, len(rows) - size + 1), size))
    training = replace(own_training(config), steps=len(batches), batch_size=size)
    job = Job("pooled", start, batches, training, snapshots=step_counts(len(batches)))
    (result,) = clients.engine.train([job])
    shared = {count: (start + delta, nothing_added) for count, delta in result.snapshots.items()}
    return {**_best_of(clients, {0: (start, nothing_added), **shared}), "tokens": result.num_tokens}


def federated(trial: Trial, setting: Setting) -> Figures:
    """Do a run round by round; under the option `home` each client then trains so many steps by itself.

    It has as few nodes as `fedllm run` has: clients of one node share passes, which a GPU needs to be fast.
    """
    with TemporaryDirectory() as scratch:  # for what clients keep: each trial begins with nothing
        config = setting.config(trial, {"run.output": scratch})
        clients = open_clients(config)
        state = init(config, num_nodes=least_nodes(config))
        kept = {0: _shared(state)}
        for number in range(1, config.federation.num_rounds + 1):
            state, _ = step(state)
            if number in step_counts(config.federation.num_rounds):
                kept[number] = _shared(state)
        costs = _costs(clients, config, state)
        if home := int(trial.options.get("home", 0)):
            rates = map(float, str(trial.options["home_rates"]).split(","))
            own = [_then_home(clients, config, state, home, rate, costs) for rate in rates]
            return min(own, key=lambda figures: figures["choosing"])
        figures = _best_of(clients, kept)
        return {**figures, **costs, "steps": _steps_of_each(config, figures["steps"])}


KINDS: Kinds = {"base": base, "alone": alone, "centralised": centralised, "federated": federated}


def own_training(config: RunConfig) -> LocalTraining:
    """Return how a client trains that has nobody to stay close to: the run's numbers without FedProx."""
    return replace(resolve(config).training(1), proximal=0.0)


def pooled_rows(clients: Clients, config: RunConfig, steps: int) -> Rows:
    """Return what all clients would draw in `steps` steps: the first step of each, then the second."""
    drawn = {name: _drawn(clients, config, name, steps, 0) for name in clients.holder.clients}
    size = config.train.batch_size
    return tuple(
        row
        for number in range(steps)
        for rows in drawn.values()
        for row in rows[number * size : (number + 1) * size]
    )


def _drawn(clients: Clients, config: RunConfig, name: str, steps: int, start: int) -> Rows:
    train = clients.holder.clients[name].train
    if not train:
        return ()
    count = steps * config.train.batch_size
    indices = draw_rows(len(train), seed=config.seed, client_id=name, start=start, count=count)
    return tuple(train[index] for index in indices)


def _tokens(clients: Clients, config: RunConfig, steps: int, drawn: Mapping[str, int]) -> int:
    """Return the tokens of all clients' next `steps` steps."""
    names = clients.holder.clients
    rows = (_drawn(clients, config, name, steps, drawn.get(name, 0)) for name in names)
    return sum(len(row.tokens) for of_client in rows for row in of_client)


def _initial(clients: Clients) -> Shared:
    return clients.holder.initial.vector, no_base_delta(clients.engine.layout)


def _shared(state: LocalState) -> Shared:
    return state.adapter.vector, state.server.base_delta


def _train_own(
    clients: Clients, config: RunConfig, start_P: torch.Tensor, steps: int, drawn: Mapping[str, int]
) -> dict[str, AtHome]:
    """Train every client by itself; its rows go on after those it has `drawn`."""
    return train_at_home(
        clients.engine,
        clients.engine.layout,
        clients.holder.clients,
        dict.fromkeys(clients.holder.clients, start_P),
        own_training(config),
        counts=dict.fromkeys(clients.holder.clients, step_counts(steps)),
        seed=config.seed,
        drawn=drawn,
    )


def _then_home(
    clients: Clients, config: RunConfig, state: LocalState, steps: int, rate: float, costs: Figures
) -> Figures:
    start_P, added = _shared(state)
    drawn = state.server.num_drawn
    with with_base_delta(clients.engine.base, added):
        at_rate = config.override({"train.learning-rate": rate})
        figures = _own(clients, _train_own(clients, at_rate, start_P, steps, drawn))
    before = _steps_of_each(config, config.federation.num_rounds)
    own = {
        "tokens": costs["tokens"] + _tokens(clients, config, steps, drawn),
        "steps": before + figures["steps"],
        "home_rate": rate,
    }
    return {**figures, **costs, **own}


def _costs(clients: Clients, config: RunConfig, state: LocalState) -> Figures:
    """Return what the rounds of a run sent and spent; a privacy plan may withhold the count of tokens."""
    records, private = state.records, state.records[-1].privacy
    each = _steps_of_each(config, config.federation.num_rounds)
    return {
        "tokens": sum(record.training.num_tokens for record in records)
        or _tokens(clients, config, round(each), {}),
        "bytes_up": sum(record.bytes_up for record in records),
        "epsilon": private.epsilon if private else None,
    }


def _steps_of_each(config: RunConfig, rounds: float) -> float:
    """Return how many steps a client takes in so many rounds on average; a round may ask only some."""
    return rounds * config.train.local_steps * resolve(config).cohort.size / config.federation.num_clients


def _best_of(clients: Clients, shared: Mapping[int, Shared]) -> Figures:
    """Return the figures of the best of several adapters, each of which all clients share."""

    def on(count: int, rows: Mapping[str, Rows]) -> dict[str, float]:
        vector, added = shared[count]
        with with_base_delta(clients.engine.base, added):
            return losses(clients.engine, dict.fromkeys(rows, vector), rows)

    choosing = {count: finite_mean(on(count, clients.choosing).values()) for count in shared}
    best = min(choosing, key=lambda count: choosing[count])
    vector, added = shared[best]
    with with_base_delta(clients.engine.base, added):
        others = losses_on_others(clients, dict.fromkeys(clients.measuring, vector))
    found = on(best, clients.measuring)
    last = found if best == max(shared) else on(max(shared), clients.measuring)
    return _figures(found, last, others, steps=best, choosing=choosing[best])


def _own(clients: Clients, own: Mapping[str, AtHome]) -> Figures:
    """Return the figures of adapters that each client has by itself."""
    return _figures(
        {name: one.loss for name, one in own.items()},
        {name: one.measured[max(one.measured)] for name, one in own.items()},
        losses_on_others(clients, {name: one.vector for name, one in own.items()}),
        steps=fmean(one.steps for one in own.values()),
        choosing=finite_mean(one.choosing[one.steps] for one in own.values()),
    )


def _figures(
    found: Mapping[str, float],
    last: Mapping[str, float],
    others: Mapping[str, float],
    *,
    steps: float,
    choosing: float,
) -> Figures:
    """Return the figures of a cell.

    Raises:
        DivergedError: what was chosen has a loss that is no finite number, which no table can hold.
    """
    if not all(map(math.isfinite, (choosing, *found.values()))):
        raise DivergedError(
            "a held-out loss is no finite number; lower the rates, or set model.dtype = float32"
        )
    return {
        "clients": dict(found),
        "last": dict(last),
        "others": dict(others),
        "steps": steps,
        "choosing": choosing,
        "mean_after": fmean(found.values()),
    }
