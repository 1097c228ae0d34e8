"""The trials of the privacy experiment: one federation, what its ledger says and what an attack finds of it.

Everything is done in one process as the product does it. Losses are measured on the clients' rows, not by the
run, since a private run may withhold them. The noise comes from a secret of the operating system, never from
the seed, so a trial that is done again has another draw of it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from clients.data_holder import DataHolder
from clients.process import PROCESS
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.engine.engine import Engine
from fedllm.errors import NonFiniteError
from scripts.auditing.control import overfit
from scripts.auditing.membership import CURVE, null_deviation, scored_rows, separations
from scripts.auditing.opening import Case
from scripts.auditing.rows import sampled, trained_rows
from scripts.experiments.controls import evaluate, holder_of
from scripts.experiments.runs import losses, run
from scripts.runtimes.local import LocalState, node_config_of
from scripts.studies.trials import Figures, Setting, Trial


def private(trial: Trial, setting: Setting) -> Figures:
    """Return the losses of a run, what it spent and, with the option `audit_rows`, its membership figures.

    `audit_rows` is how many trained rows, and how many held-out ones, are looked at.

    Raises:
        FedLLMError: the run cannot be done, or its adapter diverged.
    """
    with TemporaryDirectory() as folder:  # a client's ledger belongs to a run: no two trials share one
        config = setting.config(trial, {"run.output": folder})
        state = run(config, num_nodes=1)
        holder = PROCESS.open(config.to_flat(), node_config_of(config))  # the one that the run has opened
        start, adapter = holder.initial.vector, state.adapter.vector
        figures = losses(
            evaluate(holder, dict.fromkeys(holder.clients, start)),
            evaluate(holder, dict.fromkeys(holder.clients, adapter)),
        )
        if not math.isfinite(figures["mean_after"]):
            raise NonFiniteError("the adapter diverged: its held-out loss is not a number")
        figures["privacy"] = spent(state, config)
        num_rows = int(trial.options.get("audit_rows", 0))
        if num_rows:
            figures["membership"] = membership(state, holder, config, num_rows)
    return figures


def spent(state: LocalState, config: RunConfig) -> Mapping[str, Scalar]:
    """Return what the run's own ledger says, and the noise of its rounds: the largest of any client's."""
    if config.privacy.epsilon == "off":
        return {}
    rounds = [record.privacy for record in state.records if record.privacy is not None]
    return {
        "budget": config.privacy.epsilon,
        "epsilon": state.server.ledger.epsilon(config.privacy.delta),
        "delta": config.privacy.delta,
        "noise_multiplier": max(spent.noise_multiplier or 0.0 for spent in rounds),
        "rounds": len(rounds),
    }


def membership(state: LocalState, holder: DataHolder, config: RunConfig, num_rows: int) -> Figures:
    """Return how well rows that were trained on are told from held-out ones, with the base model's control.

    `area` and `caught` (at 1 % false alarms) are of the ratio of losses to the base model; `base` is the area
    of the base model's own losses. All signals are those of `scripts/auditing/membership.py`. There are no
    figures where coins drew no client at all.
    """
    members = [
        row for client in holder.clients.values() for row in trained_rows(client, config, state.records)
    ]
    others = [row for client in holder.clients.values() for row in client.held_out]
    if not members or not others:
        return {}
    engine: Engine = holder.engine
    vector = state.adapter.vector
    found = separations(
        scored_rows(engine, vector, sampled(members, num_rows, config.seed, "members")),
        scored_rows(engine, vector, sampled(others, num_rows, config.seed, "others")),
    )
    return _told(found)


def by_heart(trial: Trial, setting: Setting) -> Figures:
    """Return what the same attack finds where there is something to find: the positive control of an audit.

    One client's rows are learnt by heart without a federation and without privacy, as often as the option
    `epochs` says (`scripts/auditing/control.py`).
    """
    config = setting.config(trial)
    holder = holder_of(config)
    case = Case(
        folder=Path(),
        config=config,
        holder=holder,
        adapter=holder.initial,
        engine=holder.engine,
        members=(),
        others=(),
        canaries=(),
        statement={},
    )
    control = overfit(case, int(trial.options["epochs"]))
    members, others = (
        scored_rows(control.engine, control.vector, rows) for rows in (control.members, control.others)
    )
    return {"membership": _told(separations(members, others))}


def _told(found: Figures) -> Figures:
    judged = found[CURVE]["run"]
    return {
        "area": judged["area"],
        "caught": judged["caught"],
        "base": found["loss"]["base"]["area"],
        "null_deviation": null_deviation(judged["num_members"], judged["num_others"]),
        "signals": found,
    }
