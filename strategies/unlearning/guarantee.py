"""How surely a run can forget a client, or rows of one: the strongest class that its plan and log allow.

The classes are those of `fedllm.runs.unlearning`. Class A rests on keyed cohorts
(`strategies.cohort.selection`): the rounds before a client's first turn are those of a run that never had it,
unless something else in them depends on who takes part. Every such thing is looked for here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedllm.chained_log import read_entries
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.messages import JoinedClient
from fedllm.plan.run_plan import RunPlan, resolve
from fedllm.runs.folder import DECISIONS, GROUPS, read_keys, read_rounds
from fedllm.runs.records import RoundRecord
from strategies.cohort.voices import weight_limits
from strategies.sites import read_sites
from strategies.unlearning.groups import group_in_folder


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """The class that a run can give, and for each stronger one why not.

    Under class A the rounds from `first_round` on are done again, 0 = none: the client had no turn.
    """

    kind: str  # A | B | C | D
    why: str
    refused: Mapping[str, str] = field(default_factory=dict)
    first_round: int = 0
    num_rounds: int = 0  # that the run has done
    epsilon: float | None = None

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
    plan, records = resolve(RunConfig.from_flat(read_keys(run))), read_rounds(run)
    num_rounds = records[-1].round_num
    if (run / GROUPS).exists():
        group_in_folder(run, client)
        refused = {"A": "its clients trained in groups", "B": _refusal_of_b(plan, rows=rows)}
        why = "the client's group has an adapter of its own, which is trained again without it"
        return Guarantee(kind="C", why=why, refused=refused, num_rounds=num_rounds)
    starts, has_changed = _clients_of(run / DECISIONS)
    if client not in starts:
        raise ConfigError(f"{run}: client {client!r} took no part; {_names(starts)} did")
    refused = {"A": _refusal_of_a(plan, records, has_changed=has_changed)}
    if not refused["A"]:
        first, why = _first_round(plan, records, starts, client, rows=rows)
        return Guarantee(kind="A", why=why, first_round=first, num_rounds=num_rounds)
    refused["B"] = _refusal_of_b(plan, rows=rows)
    if not refused["B"]:
        epsilon, delta = _spent(run, plan), plan.config.privacy.delta
        unit = "row" if rows else "client"
        why = f"the run hides every {unit} within epsilon {epsilon:.3g} at delta {delta:g}"
        del refused["B"]
        return Guarantee(kind="B", why=why, refused=refused, num_rounds=num_rounds, epsilon=epsilon)
    refused["C"] = "all clients trained one adapter"
    why = "no state of the run is free of the client"
    return Guarantee(kind="D", why=why, refused=refused, num_rounds=num_rounds)


def _refusal_of_a(plan: RunPlan, records: Sequence[RoundRecord], *, has_changed: bool) -> str:
    """Return why rounds done again would not be those of a run without the client, "" where they are."""
    federation = plan.config.federation
    if plan.cohort.rule in ("power-of-choice", "oort"):
        return (
            f"federation.selection = {federation.selection!r} chose every cohort by the losses of all clients"
        )
    if federation.over_selection > 1 or any(record.staleness for record in records):
        return "updates counted by when they came, which no other run repeats"
    if has_changed:
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


def _clients_of(log: Path) -> tuple[dict[str, JoinedClient], bool]:
    """Return the clients that a run began with, and whether others took part at any later time.

    Raises:
        ConfigError: there is no such log, or it is damaged.
    """
    starts: list[dict[str, JoinedClient]] = []
    has_begun = has_changed = False
    try:
        entries = list(read_entries(log))
    except FileNotFoundError:
        raise ConfigError(
            f"{log}: missing, so nothing says who took part when; where the run has unlearnt by class D,"
            " unlearn from the run before it"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{log}: cannot be read ({type(error).__name__}); restore it") from None
    for entry in entries:
        if entry["event"] == "begun":
            starts.append({})
            has_begun = False
        elif entry["event"] == "round":
            has_begun = True
        elif entry["event"] == "joined":
            fields = {name: entry[name] for name in ("num_train", "num_held_out", "fingerprint", "site")}
            client = JoinedClient(client_id=entry["client"], node_id=entry["node"], **fields)
            has_changed |= has_begun and not _is_same(starts[-1].get(client.client_id), client)
            starts[-1][client.client_id] = client
    first, *later = [start for start in starts if start] or [{}]  # without those that nobody joined
    for start in later:
        has_changed |= start.keys() != first.keys()
        has_changed |= any(not _is_same(first.get(name), client) for name, client in start.items())
    return first, has_changed


def _is_same(before: JoinedClient | None, now: JoinedClient) -> bool:
    """Return whether a client is back as it was; a node that was started again may have another id."""
    return before is not None and replace(before, node_id=now.node_id) == now


def _spent(run: Path, plan: RunPlan) -> float:
    """Return the epsilon that a private run has spent; of an unfinished one its whole budget."""
    try:
        return float(json.loads((run / "privacy.json").read_text())["epsilon"])
    except (OSError, ValueError, KeyError, TypeError):
        return plan.privacy.epsilon if plan.privacy is not None else 0.0


def _names(clients: Iterable[str]) -> str:
    found = sorted(clients)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
