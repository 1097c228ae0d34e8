"""Which trials a study of one recipe is made of: its methods, the steps that each may spend, rates and seeds.

The learning rate of every method is the best of the same few, chosen with the first seed on the rows that
choose; the other seeds take it as it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve
from scripts.studies.trials import Outcome, RunTrials, Trial

METHODS = {
    "base": "the model as it is",
    "alone": "each client for itself",
    "centralised": "all rows in one place",
    "one-shot": "one round of all the steps",
    "federated": "the run of the recipe",
    "home": "fewer rounds, then steps at home",
    "distilled": "federated, with the distillation of the recipe",
    "private": "federated, under the privacy of the recipe",
    "private-home": "private, then steps at home, which cost no privacy",
}
# The techniques that a method has only where it is named for them, and what is no part of a comparison.
_PLAIN: dict[str, Scalar] = {
    "privacy.epsilon": "off",
    "privacy.noise-multiplier": "auto",
    "distill.when": "never",
    "personal.mode": "none",
    "audit.canaries": 0,
    "evaluation.every": "ends",
    "federation.sites": "",
    "run.resume": False,
}
_NEITHER = frozenset({"run.name", "run.output", "run.purpose", "model.num-threads"})  # moves a result


@dataclass(frozen=True)
class Budget:
    """What every method may spend: `steps` of each client on average, of which `home` at the end at home.

    `rounds` of the recipe's local steps spend them all; so do `shared_rounds` of `shared_steps` each and then
    the steps at home.
    """

    steps: int
    home: int
    rounds: int
    shared_rounds: int
    shared_steps: int


@dataclass(frozen=True)
class Study:
    """A study of one recipe: its methods, the learning rates each may take, and its seeds."""

    name: str
    config: RunConfig
    methods: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def flat(self) -> dict[str, Scalar]:
        """The keys that all its trials share, where they are not the default."""
        default = RunConfig().to_flat()
        given = self.config.to_flat()
        return {key: given[key] for key in given if given[key] != default[key] and key not in _NEITHER}


@dataclass(frozen=True)
class Done:
    """What a study's trials gave: one outcome a method and seed, each method at its best rate.

    `tried` are the outcomes of the first seed at every rate.
    """

    outcomes: tuple[Outcome, ...]
    tried: tuple[Outcome, ...]
    rates: Mapping[str, float]


def budget_of(config: RunConfig) -> Budget:
    """Return what every method of a study may spend.

    Half of the recipe's steps are at home, or as many more as a recipe with `personal.mode = finetune` says.
    """
    federation, local, plan = config.federation, config.train.local_steps, resolve(config)
    share = plan.cohort.size / federation.num_clients  # of the clients, that a round asks
    in_rounds = federation.num_rounds * local * share
    if plan.at_home is not None:
        home = config.personal.steps
        rounds = federation.num_rounds + round(home / (local * share))
        return Budget(round(in_rounds) + home, home, rounds, federation.num_rounds, local)
    steps = max(2, round(in_rounds))
    shared_rounds = max(1, federation.num_rounds // 2)
    shared_steps = local if federation.num_rounds > 1 else max(1, local // 2)
    home = max(1, steps - round(shared_rounds * shared_steps * share))
    return Budget(steps, home, federation.num_rounds, shared_rounds, shared_steps)


def methods_of(config: RunConfig) -> tuple[str, ...]:
    """Return the methods that make sense for a recipe: those of techniques it uses among them."""
    is_private = resolve(config).privacy is not None
    absent = {
        "one-shot": config.federation.num_rounds == 1,  # then that is what "federated" is
        "distilled": config.distill.when == "never",
        "private": not is_private,
        "private-home": not is_private,
    }
    return tuple(method for method in METHODS if not absent.get(method))


def check_methods(names: Sequence[str], config: RunConfig) -> tuple[str, ...]:
    """Return the methods that are named, in the order of `METHODS`; all that make sense where none is.

    Raises:
        ConfigError: there is no such method, or the recipe does not say how it goes.
    """
    known = methods_of(config)
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"--methods {name}: expected some of {', '.join(known)}")
        if name not in known:
            raise ConfigError(f"--methods {name}: the recipe has none; it can compare {', '.join(known)}")
    return tuple(method for method in known if not names or method in names)


def do_study(study: Study, do: RunTrials) -> Done:
    """Do all trials of a study: every rate with the first seed, then each method's best with the others."""
    first, *others = study.seeds
    tried = do([trial for method in study.methods for trial in _trials(study, method, study.rates, first)])
    rates: dict[str, float] = {}
    best: dict[str, Outcome] = {}
    for outcome in tried:
        method = str(outcome.trial.labels["method"])
        if method not in best or _choosing(outcome) < _choosing(best[method]):
            best[method], rates[method] = outcome, float(outcome.trial.labels["rate"])
    wanted = [
        trial
        for seed in others
        for method in study.methods
        for trial in _trials(study, method, (rates[method],), seed)
    ]
    return Done((*best.values(), *do(wanted)), tuple(tried), rates)


def possible_trials(study: Study) -> list[Trial]:
    """Return every trial that a study may come to ask for: all rates with all seeds."""
    return [
        trial
        for seed in study.seeds
        for method in study.methods
        for trial in _trials(study, method, study.rates, seed)
    ]


def _choosing(outcome: Outcome) -> float:
    return float(outcome.figures["choosing"]) if outcome.is_done else math.inf


def _trials(study: Study, method: str, rates: Sequence[float], seed: int) -> list[Trial]:
    """Return the trials of a method with a seed, one for each rate; the base model has none."""
    kind, keys, options = _how(study.config, method)
    return [
        Trial(
            study.name,
            kind,
            {"method": method, "seed": seed, "rate": rate},
            {**keys, "seed": seed, **({"train.learning-rate": rate} if rate else {})},
            {**options, **({"home_rates": _at_most(study.rates, rate)} if "home" in options else {})},
        )
        for rate in (rates if method != "base" else (0.0,))
    ]


def _at_most(rates: Sequence[float], rate: float) -> str:
    """Return the rates that steps at home choose among: those of the study up to that of the rounds."""
    return ",".join(f"{one:g}" for one in sorted(rates) if one <= rate)


def _how(config: RunConfig, method: str) -> tuple[str, dict[str, Scalar], dict[str, Scalar]]:
    """Return a method's kind of trial, the keys that it sets, and its options."""
    budget, given = budget_of(config), config.to_flat()
    if method in ("base", "alone", "centralised"):
        return method, _PLAIN, {"steps": budget.steps} if method != "base" else {}
    keys = {**_PLAIN, "federation.num-rounds": budget.rounds}
    if method == "one-shot":
        everybody: dict[str, Scalar] = {"federation.cohort": "all", "federation.selection": "uniform"}
        keys |= {"federation.num-rounds": 1, "train.local-steps": budget.steps, **everybody}
    if method == "distilled":
        keys["distill.when"] = given["distill.when"]
    if method.startswith("private"):
        keys |= {key: given[key] for key in ("privacy.epsilon", "privacy.noise-multiplier")}
    if not method.endswith("home"):
        return "federated", keys, {}
    shared: dict[str, Scalar] = {
        "federation.num-rounds": budget.shared_rounds,
        "train.local-steps": budget.shared_steps,
    }
    return "federated", {**keys, **shared}, {"home": budget.home}
