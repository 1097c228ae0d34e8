"""What each class of unlearning leaves of a client, and what it costs, against runs that never had it.

Seven clients train with canaries among their rows, a few in each round; one of them leaves. For each seed:

    with         the adapter that is to forget the client
    retrained    a run that never had it: what unlearning is judged by
    replay       class A: the rounds from the client's first turn on are done again without it
    group        class C: clients in three groups, and the client's group is trained again
    ascent, subtraction   class D, on the finished adapter
    nothing      a control: the adapter of `with`, called unlearnt

"Others" are the clients that stay, their held-out loss the mean. Turns are clients' rounds of training,
seconds those of this process, one after the other.

    python -m scripts.experiments forgetting --quick --json
    python -m scripts.experiments forgetting --data FOLDER --output docs/results/unlearning.json
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.table import Table

from clients.canaries import canary_file
from fedllm.adapters.layout import AdapterState
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.files import make_private_folder, write_once
from fedllm.privacy.keys import derived_key
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import run_folder
from scripts.experiments.corpus import write_rows
from scripts.experiments.options import (
    ONE_THREAD,
    PACKAGES,
    ExperimentOptions,
    model_of,
    open_console,
    size_of,
    text_of,
    work_folder,
)
from scripts.experiments.small_model import Recipe
from scripts.reports import Goal, environment, figures_table, publish
from scripts.unlearning.approximate import METHODS, Case, forget
from scripts.unlearning.left import EXPOSURE, MEASURES, left_of, losses_of
from scripts.unlearning.verify import ALPHA, Verdict, holder_of, states_of
from strategies.unlearning.groups import in_groups, mean_of_groups

GROUPS = 3
TURNS, SECONDS, OTHERS = "turns", "seconds", "others' held-out loss"
FIGURES = (*MEASURES, OTHERS, TURNS, SECONDS)
SHORT = ("exposure", "found", "own", "others", "turns", "s", "exp.", "found", "own")  # as columns
JUDGED = ("replay", "group", *METHODS, "nothing")
Figures = dict[str, dict[str, float]]  # adapter -> figure -> value


@dataclass(frozen=True)
class Size:
    """One size of the experiment; `flat` holds the keys of all runs."""

    flat: Mapping[str, Scalar]
    rows_of_domain: int
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: Recipe | None = None


_FLAT: dict[str, Scalar] = {
    **ONE_THREAD,
    **{"lora.rank": 8, "lora.alpha": 16.0, "wire.codec": "fp32"},
    **{"federation.num-rounds": 8, "federation.cohort": 3, "audit.canaries": "24:8"},
    **{"train.local-steps": 10, "train.batch-size": 4, "train.learning-rate": 1e-2},
    **{"train.max-length": 128, "data.held-out-fraction": 0.5, "data.max-held-out": 100},
}
# So many canaries that a run with the client can be told from one without it.
FULL = Size(
    flat={**_FLAT, "audit.canaries": "24:32", "train.local-steps": 20}, rows_of_domain=200, recipe=Recipe()
)
QUICK = Size(
    flat={**_FLAT, "federation.num-rounds": 3, "train.local-steps": 2},
    rows_of_domain=24,
    recipe=Recipe(steps=60),
)
SMOLLM2 = Size(flat={**_FLAT, "train.learning-rate": 1e-3, "model.device": "auto"}, rows_of_domain=200)


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    """What can be asked for."""


@dataclass(eq=False)
class Tried:
    """The adapters of one seed, and what each took: turns of clients, and seconds."""

    adapters: dict[str, AdapterState] = field(default_factory=dict)
    costs: dict[str, tuple[int, float]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def add(self, name: str, adapter: AdapterState, turns: int) -> None:
        """Note an adapter that was made since the last one was."""
        now = time.perf_counter()
        self.adapters[name], self.costs[name] = adapter, (turns, now - self.began)
        self.began = now


def do_seed(config: RunConfig, client: str) -> Figures:
    """Return the figures of every adapter of one seed."""
    secret = canary_file(run_folder(config) / "private", config.run.name)
    make_private_folder(secret.parent)
    # In an experiment the coins are no secret: whoever repeats it tosses the same.
    write_once(secret, derived_key(b"an experiment's canaries", config.seed))
    holder, tried = holder_of(config), Tried()
    states = states_of(config)
    case = Case(holder, client, states)
    tried.add("with", states[-1].adapter, _turns(states))
    retrained = states_of(config, without={client})
    tried.add("retrained", retrained[-1].adapter, _turns(retrained))
    asked = [record.round_num for record in states[-1].records if client in record.asked]
    start = states[min(asked, default=len(states)) - 1]
    again = states_of(config, {client}, start)
    tried.add("replay", again[-1].adapter, _turns(again))
    _add_group(tried, config, client, sorted(holder.clients))
    own_turns = sum(client in record.accepted for record in states[-1].records)
    for method in METHODS:
        tried.add(method, forget(case, method), own_turns)
    tried.add("nothing", states[-1].adapter, 0)
    return _figures(case, tried)


def _add_group(tried: Tried, config: RunConfig, client: str, names: Sequence[str]) -> None:
    """Train the clients in groups, and the group of `client` once more without it."""
    groups = in_groups(names, GROUPS, config.seed)
    done = {group: states_of(config, {*names} - {*inside}) for group, inside in groups.items()}
    before = [states[-1].adapter for states in done.values()]
    tried.add("groups", mean_of_groups(before, [*map(len, groups.values())]), sum(map(_turns, done.values())))
    left = {group: [name for name in inside if name != client] for group, inside in groups.items()}
    (group,) = (group for group in groups if client in groups[group])
    again = states_of(config, {*names} - {*left[group]}) if left[group] else ()
    after = {**done, group: again}
    present = [one for one in groups if left[one]]
    adapter = mean_of_groups([after[one][-1].adapter for one in present], [len(left[one]) for one in present])
    tried.add("group", adapter, _turns(again))


def _turns(states: Sequence[ServerState]) -> int:
    """Return how often a client trained between the first and the last of these states."""
    if not states:
        return 0
    begun = states[0].round_num
    return sum(len(record.accepted) for record in states[-1].records if record.round_num > begun)


def _figures(case: Case, tried: Tried) -> Figures:
    adapters = [*tried.adapters.values()]
    measured = left_of(case.holder, case.client, case.final.records, adapters)
    found: Figures = {}
    for name, left, losses in zip(tried.adapters, measured, losses_of(case.holder, adapters), strict=True):
        del losses[case.client]
        turns, seconds = tried.costs[name]
        found[name] = {**left, OTHERS: fmean(losses.values()), TURNS: turns, SECONDS: seconds}
        found[name]["same bits as retrained"] = float(
            tried.adapters[name].digest == tried.adapters["retrained"].digest
        )
    return found


def verdicts_of(seeds: Sequence[Figures]) -> dict[str, dict[str, Verdict]]:
    """Return by way of unlearning and measure how it compares with retraining, over the seeds."""

    def values(name: str, measure: str) -> list[float]:
        return [found[name][measure] for found in seeds]

    return {
        name: {
            measure: Verdict(
                with_client=values("with", measure),
                retrained=values("retrained", measure),
                unlearnt=values(name, measure),
            )
            for measure in MEASURES
        }
        for name in JUDGED
    }


def table_of(seeds: Sequence[Figures], verdicts: Mapping[str, Mapping[str, Verdict]]) -> Table:
    """Return a row for each adapter: means over the seeds, and how it compares with retraining."""
    rows = {}
    for name in seeds[0]:
        words = [verdicts[name][one].in_words.split()[0] if name in verdicts else "" for one in MEASURES]
        rows[name] = [f"{fmean(one[name][figure] for one in seeds):.3g}" for figure in FIGURES] + words
    return figures_table("means over the seeds; like or unlike retraining by three measures", SHORT, rows)


def goals_of(seeds: Sequence[Figures], verdicts: Mapping[str, Mapping[str, Verdict]]) -> dict[str, Goal]:
    """Return the goals: exact is exact, the measure can tell, ascent forgets and costs the others little."""

    def mean(name: str, figure: str) -> float:
        return fmean(one[name][figure] for one in seeds)

    excess = mean("with", EXPOSURE) - mean("retrained", EXPOSURE)
    gone = (mean("with", EXPOSURE) - mean("ascent", EXPOSURE)) / excess if excess > 0 else 0.0
    return {
        "replay_has_the_bits_of_retraining": Goal(mean("replay", "same bits as retrained"), 1.0),
        "exposure_tells_the_client": Goal(verdicts["nothing"][EXPOSURE].p_control, ALPHA, at_most=True),
        "ascent_share_of_exposure_gone": Goal(gone, 0.8),
        "ascent_costs_others_nats": Goal(mean("ascent", OTHERS) - mean("with", OTHERS), 0.05, at_most=True),
    }


def main(options: Options) -> None:
    """Do the experiment, print and keep its figures."""
    console = open_console(options)
    size = size_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2)
    corpus = text_of(options, size, console)
    model, described = model_of(options.model, size.recipe, corpus, console)
    work, client = work_folder(options, "forgetting"), corpus.domains[0]
    rows = [{**row, "client": row["domain"]} for row in corpus.rows]
    flat = {
        **size.flat,
        "model.name": model,
        "run.output": str(work),
        "data.source": str(write_rows(work / "rows.jsonl", rows)),
        "federation.num-clients": len(corpus.domains),
    }
    seeds = []
    for seed in size.seeds:
        console.print(f"seed {seed}")
        config = RunConfig.from_flat({**flat, "seed": seed, "run.name": f"seed-{seed}"})
        seeds.append(do_seed(config, client))
    verdicts = verdicts_of(seeds)
    console.print(table_of(seeds, verdicts))
    figures: dict[str, Any] = {
        "environment": environment(PACKAGES),
        "model": described,
        "settings": {"quick": options.quick, "flat": dict(size.flat), "client": client, "groups": GROUPS},
        "seeds": dict(zip(map(str, size.seeds), seeds, strict=True)),
        "verdicts": {
            name: {measure: one.to_dict() for measure, one in of.items()} for name, of in verdicts.items()
        },
    }
    publish(options, "forgetting", figures, goals_of(seeds, verdicts))
