"""How surely a run can forget a client, or rows of one: the strongest class that its plan and log allow.

The classes are those of `fedllm.runs.unlearning`. Class A rests on keyed cohorts
(`strategies.cohort.selection`): the rounds before a client's first turn are those of a run that never had it,
unless something else in them depends on who takes part. Every such thing is looked for here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.messages import JoinedClient
from fedllm.plan.run_plan import RunPlan, resolve
from fedllm.runs.folder import DECISIONS, GROUPS, read_keys, read_rounds
from fedllm.runs.records import RoundRecord
from strategies.cohort.voices import weight_limits
from strategies.sites import read_sites
from strategies.unlearning.beginning import beginning_of, runs_beside
from strategies.unlearning.groups import group_in_folder
from strategies.unlearning.took_part import TookPart, read_took_part


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """The class that a run can give, and for each stronger one why not.

    Under class A the rounds from `first_round` on are done again, 0 = none: the client had no turn. Where the
    adapter that the run began from knows the client, they begin from the one in the folder `instead`; where
    there is none, `earlier` names the run to unlearn first.
    """

    kind: str  # A | B | C | D
    why: str
    refused: Mapping[str, str] = field(default_factory=dict)
    first_round: int = 0
    num_rounds: int = 0  # that the run has done
    epsilon: float | None = None
    instead: str = ""
    earlier: str = ""

    @property
    def needs_work(self) -> bool:
        """Whether the adapter must be made anew."""
        return self.kind in "CD" or self.first_round > 0

    @property
    def num_again(self) -> int:
        """How many rounds are done again under class A."""
        return self.num_rounds - self.first_round + 1 if self.first_round else 0


def guarantee_of(run: Path, client: str, *, rows: bool = False) -> Guarantee:
    """Return how surely the run in a folder can forget a client, or with `rows` some rows of it.

    Raises:
        ConfigError: the folder holds no run that can be read, or the client took no part in it.
    """
    return _guarantee(run, client, runs_beside(run), rows=rows)


def _guarantee(run: Path, client: str, others: Sequence[Path], *, rows: bool) -> Guarantee:
    """Return a guarantee; `others` are the runs among which the one it began from is looked for."""
    plan, records = resolve(RunConfig.from_flat(read_keys(run))), read_rounds(run)
    num_rounds = records[-1].round_num
    if (run / GROUPS).exists():
        group_in_folder(run, client)
        refused = {"A": "its clients trained in groups", "B": _refusal_of_b(plan, rows=rows)}
        why = "the client's group has an adapter of its own, which is trained again without it"
        return Guarantee(kind="C", why=why, refused=refused, num_rounds=num_rounds)
    there = read_took_part(run / DECISIONS)
    if client not in there.clients:
        raise ConfigError(f"{run}: client {client!r} took no part; {_names(there.clients)} did")
    began = beginning_of(run, others, partial(_never_had, client=client, others=others, rows=rows))
    refused = {"A": began.refusal or _refusal_of_a(plan, records, there)}
    if not refused["A"]:
        first, why = _first_round(plan, records, there.clients, client, rows=rows)
        if began.instead:
            first, why = 1, "its first adapter knows it, and one that has forgotten it takes its place"
        return Guarantee(kind="A", why=why, first_round=first, num_rounds=num_rounds, instead=began.instead)
    may_know = began.knows or bool(there.given)
    refused["B"] = "the adapter it began from may know it" if may_know else _refusal_of_b(plan, rows=rows)
    if not refused["B"]:
        epsilon, delta = _spent(run, plan), plan.config.privacy.delta
        unit = "row" if rows else "client"
        why = f"the run hides every {unit} within epsilon {epsilon:.3g} at delta {delta:g}"
        del refused["B"]
        return Guarantee(kind="B", why=why, refused=refused, num_rounds=num_rounds, epsilon=epsilon)
    refused["C"] = "all clients trained one adapter"
    why = "no state of the run is free of the client"
    return Guarantee(kind="D", why=why, refused=refused, num_rounds=num_rounds, earlier=began.earlier)


def _never_had(run: Path, client: str, others: Sequence[Path], *, rows: bool) -> bool:
    """Return whether a run's adapter is for certain that of a run without a client, or without its rows."""
    left = [other for other in others if other != run]
    try:
        there = read_took_part(run / DECISIONS)
        if client in there.clients:
            found = _guarantee(run, client, left, rows=rows)
            return found.kind == "A" and not found.needs_work
    except ConfigError:
        return False
    earlier = beginning_of(run, left, partial(_never_had, client=client, others=left, rows=rows))
    return not (there.has_changed or there.given or earlier.knows)


def _refusal_of_a(plan: RunPlan, records: Sequence[RoundRecord], there: TookPart) -> str:
    """Return why rounds done again would not be those of a run without the client, "" where they are."""
    if there.given:
        return f"it was given {' and '.join(there.given)} by a program, which no folder keeps"
    federation = plan.config.federation
    if plan.cohort.rule in ("power-of-choice", "oort"):
        return (
            f"federation.selection = {federation.selection!r} chose every cohort by the losses of all clients"
        )
    if federation.over_selection > 1 or any(record.staleness for record in records):
        return "updates counted by when they came, which no other run repeats"
    if there.has_changed:
        return "the set of clients changed while it ran"
    if plan.privacy is not None:
        return "rounds done again would spend the other clients' privacy budget a second time"
    return ""


def _refusal_of_b(plan: RunPlan, *, rows: bool) -> str:
    if plan.privacy is None:
        return "the run had no privacy budget"
    if plan.privacy.is_by_example and not rows:
        return "privacy.unit = 'example' hides single rows, not all rows of a client"
    return ""


def _first_round(
    plan: RunPlan,
    records: Sequence[RoundRecord],
    clients: Mapping[str, JoinedClient],
    client: str,
    *,
    rows: bool,
) -> tuple[int, str]:
    """Return the first round that the client, or its rows, may have touched (0 = none), and why that one."""
    rest = {name: each for name, each in clients.items() if name != client}
    if rows:  # nobody says how many it will have: what others weigh moves one way, so the fewest tell
        rest[client] = replace(clients[client], num_train=1)
    if why := _touches_all(plan, clients, rest):
        return 1, why
    for record in records:
        # A failed attempt leaves no record, so that it may have asked anybody
        if client in record.asked or record.attempt > 1:
            return record.round_num, f"round {record.round_num} was the first that could have asked it"
        if record.distillation is not None:
            return record.round_num, f"round {record.round_num} distilled, and asked all clients about it"
    return 0, "no round asked it, so that the adapter is that of a run without it"


def _touches_all(plan: RunPlan, clients: Mapping[str, JoinedClient], rest: Mapping[str, JoinedClient]) -> str:
    """Return what differs in every round where only the `rest` takes part, "" where nothing does."""
    config = plan.config
    if plan.cohort.rule != "uniform":
        return f"federation.selection = {plan.cohort.rule!r} draws every cohort anew without it"
    if config.train.control_variates or plan.aggregation.local_b or plan.personal is not None:
        return "clients keep what they learn from round to round, and keep no earlier state of it"
    ranks = plan.ranks(clients)
    if any(ranks[name] != rank for name, rank in plan.ranks(rest).items()):
        return "lora.client-ranks deals its rank to another client without it"
    sites = read_sites(config.federation.sites)
    before, after = (weight_limits(some.values(), plan, sites) for some in (clients, rest))
    if any(
        before[name] != after[name] for name in rest.keys() & before.keys() if rest[name] == clients[name]
    ):
        return "what other clients may weigh at most depends on it"
    return ""


def _spent(run: Path, plan: RunPlan) -> float:
    """Return the epsilon that a private run has spent; of an unfinished one its whole budget."""
    try:
        return float(json.loads((run / "privacy.json").read_text())["epsilon"])
    except (OSError, ValueError, KeyError, TypeError):
        return plan.privacy.epsilon if plan.privacy is not None else 0.0


def _names(clients: Iterable[str]) -> str:
    found = sorted(clients)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
