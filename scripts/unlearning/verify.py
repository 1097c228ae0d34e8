"""Whether an unlearnt adapter can be told from one that never had the client, over several seeds.

The recipe is run three ways with each seed: with the client, without it (retraining), and with it and then
unlearnt. The measures of `scripts.unlearning.left` ask what is left of the client's rows. The seeds are the
samples of a two-sample test (Welch), since adapters of one recipe differ from seed to seed. A measure that
cannot tell the run with the client from retraining has no power, and says nothing of the unlearnt one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from scipy.stats import ttest_ind

from clients.data_holder import DataHolder
from clients.process import PROCESS
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.dealt_numbers import parse_canaries
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.unlearning import LIKE, UNKNOWN, UNLIKE
from scripts.runtimes.local import init, node_config_of, step
from scripts.unlearning.approximate import Case, forget
from scripts.unlearning.left import MEASURES, left_of

LEAST_SEEDS = 3
ALPHA = 0.05  # chance of telling two adapters apart that are alike
CANARIES = "48:4,16"  # where the recipe plants none


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One measure by seed, and two p-values: is the run with the client, or the unlearnt one, retraining?"""

    with_client: Sequence[float]
    retrained: Sequence[float]
    unlearnt: Sequence[float]

    @property
    def p_control(self) -> float:
        """Of the run with the client; where it is large the measure has no power."""
        return welch(self.with_client, self.retrained)

    @property
    def p_unlearnt(self) -> float:
        """Of the unlearnt adapters."""
        return welch(self.unlearnt, self.retrained)

    @property
    def in_words(self) -> str:
        """How the unlearnt adapters compare with retraining."""
        if self.p_unlearnt < ALPHA:
            return UNLIKE
        return LIKE if self.p_control < ALPHA else UNKNOWN

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        means = {name: fmean(values) for name, values in vars(self).items()}
        return {**means, "p_control": self.p_control, "p": self.p_unlearnt, "verdict": self.in_words}


def welch(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the p-value of two samples having one mean, whose variances may differ (Welch 1947)."""
    if len({*first, *second}) == 1:
        return 1.0  # all are equal: nothing tells them apart
    if len({*first}) == len({*second}) == 1:
        return 0.0  # no seed varies, and the two differ
    return float(ttest_ind(first, second, equal_var=False).pvalue)


def verify(config: RunConfig, client: str, method: str, seeds: Sequence[int]) -> dict[str, Verdict]:
    """Return by measure how `method` unlearns `client` from runs of a recipe, in this process.

    The runs are named by their seeds below `run.output` and keep the secrets of their canaries there.

    Raises:
        ConfigError: there are fewer than three seeds, or the runs cannot be unlearnt so.
        FedLLMError: a run cannot be done.
    """
    if len({*seeds}) < LEAST_SEEDS:
        raise ConfigError(f"a verification needs at least {LEAST_SEEDS} seeds, each another")
    found = [_of_seed(config, client, method, seed) for seed in seeds]
    return {
        name: Verdict(**{kind: [one[kind][name] for one in found] for kind in found[0]}) for name in MEASURES
    }


def _of_seed(config: RunConfig, client: str, method: str, seed: int) -> dict[str, dict[str, float]]:
    """Return what is left of the client in the three adapters of one seed."""
    config = with_canaries(config).override({"seed": seed, "run.name": f"seed-{seed}"})
    states, retrained = states_of(config), states_of(config, without={client})
    holder = holder_of(config)
    adapters = {
        "with_client": states[-1].adapter,
        "retrained": retrained[-1].adapter,
        "unlearnt": forget(Case(holder, client, states), method),
    }
    measured = left_of(holder, client, states[-1].records, list(adapters.values()))
    return dict(zip(adapters, measured, strict=True))


def holder_of(config: RunConfig) -> DataHolder:
    """Return the data holder of all clients of a run in this process."""
    return PROCESS.open(config.to_flat(), node_config_of(config))


def with_canaries(config: RunConfig) -> RunConfig:
    """Return the recipe with canaries, whose exposure is measured."""
    has_some = parse_canaries(config.audit.canaries)[0] > 0
    return config if has_some else config.override({"audit.canaries": CANARIES})


def states_of(
    config: RunConfig, without: Collection[str] = (), start: ServerState | None = None
) -> tuple[ServerState, ...]:
    """Return the states before and after each round of a run that lacks some clients, from `start` on."""
    state = init(config)
    state = replace(state, server=start or state.server)
    for client in without:
        state.session.clients.pop(client, None)
    states = [state.server]
    for _ in range(config.federation.num_rounds - state.server.round_num):
        state, _ = step(state)
        states.append(state.server)
    return tuple(states)
