"""What cannot go together: what each setting of a run needs of the others, and what it hides from them.

A new technique adds its line to `SETTINGS`; which others it cannot go with follows from that.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from fedllm.config.key import Scalar
from fedllm.config.run_config import KEYS
from fedllm.errors import ConfigError

# What a setting may need of a run, in the words of a refusal.
OWN_UPDATES = "each client's own update"
OWN_NUMBERS = "each client's own numbers of a round"
SHARED_B = "a factor B that clients send"
BOTH_FACTORS = "both factors trained in every round"
STABLE_FACTORS = "factors that keep their meaning from round to round"
SHARED_VALUES = "values of A and B that mean the same for all clients"
ONE_RANK = "clients of one rank"
FIXED_BASE = "a base model that stays as it is"
OUR_MEAN = "fedllm's own mean of the updates"
SERVER_ADAPTER = "an adapter that the server has"
PLAIN_MEAN = "a mean that takes every update as it is"
FIXED_WEIGHTS = "weights that no update can raise"
CAPPED_WEIGHTS = "weights with an upper limit"
ROW_WEIGHTS = "weights by rows"
FRESH_UPDATES = "updates of the round itself"
FIXED_COHORT = "a cohort of a fixed size"
ANY_SPEED = "a cohort that does not depend on who is fast"
ANY_SIZE = "a cohort that does not depend on who has many rows"
NOISE = "noise on all that tells of a client's rows"
NOISED_SUM = "noise on the sum of all clients"
TRUSTED_SERVER = "a trusted server that adds the noise to the sum of all clients"
MASKED_SUM = "a sum under masks"
OWN_PARTY = "every client as a party of the sum"
BUDGET = "a privacy budget"
HELD_OUT_LOSSES = "losses on rows that clients hold out"
HELD_OUT_ROWS = "rows that clients hold out"
CLIPPED_GRADIENTS = "gradients of a bounded norm"


@dataclass(frozen=True)
class Setting:
    """What one value of a key needs of a run, and what it hides from other settings.

    `does` is a clause that says why. `instead` is the value that lifts a conflict; left out, it is that of
    `INSTEAD`, or else the key's default.
    """

    does: str
    needs: Sequence[str] = ()
    hides: Sequence[str] = ()
    instead: Scalar | None = None


@dataclass(frozen=True)
class Part:
    """A setting of one run: its name, such as "wire.node-sum = true", what it means and what lifts it."""

    name: str
    setting: Setting
    cure: str


ANY = "any value but the default"
_PRODUCTS = (OWN_UPDATES, OUR_MEAN, BOTH_FACTORS)
_ROBUST = "a robust rule compares the products B A of clients and leaves out what stands apart"
_BY_VALUE = Setting("it compares clients value by value", [SHARED_VALUES], instead="geometric-median")
_BY_LOSS = Setting("clients are chosen by their losses, which are private", [OWN_NUMBERS], [NOISE])
_ON_TOP = Setting("personal adapters go on top of a shared one", [SHARED_B])
_NONE_HELD = Setting("clients hold no rows out", hides=[HELD_OUT_LOSSES, HELD_OUT_ROWS])

# Order matters for the reader alone: of several conflicts the first one found is reported.
SETTINGS: dict[str, dict[Scalar, Setting]] = {
    # Privacy: whatever a server learns of a client must be clipped, noised and charged.
    "privacy.epsilon": {
        "off": Setting("nothing is clipped or noised", hides=[BUDGET], instead=8.0),
        ANY: Setting("the guarantee covers what is noised in its own round", [NOISE, FRESH_UPDATES]),
    },
    "privacy.noise-multiplier": {
        ANY: Setting("the run ends when its budget is spent", [BUDGET, SERVER_ADAPTER])
    },
    "privacy.clip": {"adaptive": Setting("the clip follows a noised count", [BUDGET, TRUSTED_SERVER])},
    "privacy.unit": {
        "client": Setting("all that a client does is protected, its speed too", [ANY_SPEED], [], "example"),
        "example": Setting("every client adds the noise itself", [], [NOISED_SUM, TRUSTED_SERVER], "client"),
    },
    # With central noise no single update outlives the round: only the noised sum may be used.
    "privacy.trust": {
        "central": Setting(
            "the server clips every update once more and keeps one noised sum over a fixed number",
            [OWN_UPDATES, ONE_RANK, ANY_SIZE, OUR_MEAN],
            [OWN_UPDATES],
            "local",
        ),
        "distributed": Setting(
            "every client adds a share of the noise",
            [MASKED_SUM, OWN_PARTY, ANY_SIZE],
            [TRUSTED_SERVER],
            "central",
        ),
        "local": Setting("every client adds the noise itself", [], [NOISED_SUM, TRUSTED_SERVER], "central"),
    },
    "privacy.metrics": {
        "withheld": Setting("nothing leaves a client but its update", [], [HELD_OUT_LOSSES], "held-out")
    },
    "privacy.weight-cap": {
        "off": Setting("nothing bounds weights by rows", hides=[CAPPED_WEIGHTS], instead=100.0),
        ANY: Setting("weights count rows up to the cap", [NOISED_SUM, ROW_WEIGHTS]),
    },
    # The cohort: who takes part, and when an update counts.
    "federation.selection": {
        "poisson": Setting("a round waits for all whom coins have drawn", [FRESH_UPDATES], [FIXED_COHORT]),
        "weighted": Setting("clients with more rows are chosen more often", hides=[ANY_SIZE]),
        "power-of-choice": _BY_LOSS,
        "oort": _BY_LOSS,
    },
    "federation.over-selection": {
        ANY: Setting("a round keeps the clients that answer first", [FIXED_COHORT], [ANY_SPEED])
    },
    "federation.max-staleness": {
        ANY: Setting("a late update counts in another round", [OWN_UPDATES, STABLE_FACTORS], [FRESH_UPDATES])
    },
    # What a node holds and sends.
    "model.quantization": {ANY: Setting("weights of so few bits cannot hold a sum", [FIXED_BASE])},
    "lora.client-ranks": {ANY: Setting("clients train different ranks", hides=[ONE_RANK, SHARED_VALUES])},
    "secure.method": {
        "none": Setting("the server sees each client's update", hides=[MASKED_SUM], instead="masks"),
        "shares": Setting(
            "clients sum for all, and the server has no adapter",
            hides=[MASKED_SUM, SERVER_ADAPTER],
            instead="masks",
        ),
        "he": Setting("one client decrypts for all", hides=[MASKED_SUM], instead="masks"),
        ANY: Setting(
            "the server learns one sum over all clients",
            [PLAIN_MEAN, OUR_MEAN, FIXED_BASE, ONE_RANK, FIXED_COHORT, ANY_SPEED],
            [OWN_UPDATES, OWN_NUMBERS],
        ),
    },
    "wire.node-sum": {
        ANY: Setting("a node sends one sum for all its clients", [ONE_RANK], [OWN_UPDATES, OWN_PARTY])
    },
    # Aggregation. Products B A of clients can be compared; their factors only where one of them is shared.
    "aggregation.train": {
        "both": Setting("B G and G^-1 A are the same adapter for any G", [], [SHARED_VALUES], "b"),
        "b": Setting("A never changes, so that the mean of B is exact already", hides=[BOTH_FACTORS]),
        "alternate": Setting("clients send B and A in turn", hides=[BOTH_FACTORS, STABLE_FACTORS]),
    },
    # A stack or residual of an earlier round cannot be taken back, so no momentum can act on it.
    "aggregation.read-out": {
        "svd": Setting("svd writes the mean product in new factors", _PRODUCTS, [STABLE_FACTORS]),
        "projection": Setting("a new B is fitted to the mean of A", _PRODUCTS, [STABLE_FACTORS]),
        "residual": Setting("the base model gains a change", _PRODUCTS, [STABLE_FACTORS, FIXED_BASE]),
        "stack": Setting("the base model gains a change", _PRODUCTS, [STABLE_FACTORS, FIXED_BASE]),
        "local-b": Setting("A depends on a B that stays with the client", _PRODUCTS, [SHARED_B, NOISE]),
    },
    "aggregation.weighting": {
        "examples": Setting("a weight multiplies its client's clip", [CAPPED_WEIGHTS]),
        "tokens": Setting("weights are numbers of drawn tokens, which are private", hides=[NOISE]),
        "uniform": Setting("all clients count alike", hides=[ROW_WEIGHTS], instead="examples"),
        "product-norm": Setting(
            "weights are norms of the clients' products B A",
            [OWN_UPDATES, OUR_MEAN, SHARED_B],
            [FIXED_WEIGHTS],
        ),
    },
    "aggregation.robust": {
        "trimmed-mean": _BY_VALUE,
        "coordinate-median": _BY_VALUE,
        ANY: Setting(_ROBUST, [OWN_UPDATES, OUR_MEAN, SHARED_B, FIXED_WEIGHTS], [PLAIN_MEAN]),
    },
    "aggregation.optimizer": {
        ANY: Setting("a server optimizer reaches the adapter alone", [FIXED_BASE, OUR_MEAN, SERVER_ADAPTER])
    },
    # Local training and what clients keep.
    "train.control-variates": {
        ANY: Setting(
            "SCAFFOLD exchanges gradients of both factors besides the updates",
            [
                *_PRODUCTS[::2],
                SHARED_B,
                STABLE_FACTORS,
                ONE_RANK,
                PLAIN_MEAN,
                FRESH_UPDATES,
                CLIPPED_GRADIENTS,
            ],
            [NOISE],
        )
    },
    "train.clip-norm": {"off": Setting("nothing bounds what one client adds", hides=[CLIPPED_GRADIENTS])},
    "personal.mode": {
        "finetune": Setting("clients train the shared adapter on at home", [SHARED_B, HELD_OUT_ROWS]),
        "dual": _ON_TOP,
        "ditto": _ON_TOP,
    },
    # Distillation at the server.
    "distill.when": {ANY: Setting("clients' own adapters teach", [OWN_UPDATES, SHARED_B, OUR_MEAN])},
    "distill.gate": {"clients": Setting("clients judge the result", [HELD_OUT_LOSSES], instead="public")},
    "distill.originality": {"on": Setting("data holders count matches with their rows", hides=[NOISE])},
    "evaluation.every": {
        "train": Setting("clients measure a loss next to their update", [OWN_NUMBERS], instead="ends")
    },
    "data.held-out-fraction": {0.0: _NONE_HELD},
    "data.max-held-out": {0: _NONE_HELD},
}
INSTEAD: dict[str, Scalar] = {"aggregation.read-out": "factor-mean", "aggregation.weighting": "uniform"}


def active_parts(in_use: Mapping[str, Scalar], by: Mapping[str, str]) -> Iterator[Part]:
    """Yield the parts of a run that has these keys in use.

    `by` names the key that has set another one: {"aggregation.train": "aggregation.preset"}.
    """
    for key, settings in SETTINGS.items():
        default = KEYS[key].default
        value = in_use.get(key, default)
        word = value.partition(":")[0] if isinstance(value, str) else value  # "oort" of "oort:30"
        for wanted, setting in settings.items():
            if key in in_use and (wanted == word or (wanted == ANY and value != default)):
                instead = setting.instead if setting.instead is not None else INSTEAD.get(key, default)
                name, cure = assigned(key, value), assigned(key, instead)
                if source := by.get(key):  # it would set the key again
                    name += f" (by {assigned(source, in_use[source])})"
                    cure = f"{assigned(source, KEYS[source].default)} and {cure}"
                yield Part(name, setting, f"set {cure}")


def refuse_conflicts(parts: Sequence[Part]) -> None:
    """Refuse a run in which one part needs what another one hides.

    Raises:
        ConfigError: naming both, why they cannot go together and what to set instead.
    """
    for one, other in permutations(parts, 2):
        for need in one.setting.needs:
            if need in other.setting.hides:
                raise ConfigError(
                    f"{one.name} cannot go with {other.name}: {one.setting.does}, which needs {need}, while"
                    f" {other.setting.does}; {other.cure}, or {one.cure}"
                )


def assigned(key: str, value: Scalar) -> str:
    """Return "key = value" as a recipe has it."""
    return f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
