"""Every technique with every other one: which pairs are refused, and in which words.

`python -m tests.plan.refusals` writes refusals.txt again; a test compares it. Whoever changes a sentence
reads the difference, and whoever adds a technique adds it here.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from fedllm.config.run_config import KEYS, RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve

GOLDEN = Path(__file__).with_suffix(".txt")
MEAN = {"aggregation.preset": "fedit"}
SHARED_A = {"aggregation.preset": "ffa"}
CENTRAL = {"privacy.epsilon": 8.0, "privacy.unit": "client"}
LOCAL = {**CENTRAL, "privacy.trust": "local"}
COINS = {**CENTRAL, "federation.selection": "poisson", "federation.cohort": 4}
SHARES = {**CENTRAL, "privacy.trust": "distributed", "secure.method": "masks"}
DISTIL = {"distill.when": "last"}


def each(axis: str) -> dict[str, dict[str, Any]]:
    """Return a technique for each value of an axis but its default."""
    key = KEYS[f"aggregation.{axis}"]
    return {f"{axis} {word}": {key.name: word} for word in key.words if word != key.default}


# name -> the keys that turn it on, together with what it cannot do without
TECHNIQUES: dict[str, dict[str, Any]] = {
    **each("train"),
    **each("preset"),
    **each("read-out"),
    **each("weighting"),
    **each("robust"),
    "robust trimmed-mean, A fixed": {"aggregation.robust": "trimmed-mean:0.3", **SHARED_A},
    "robust coordinate-median, A fixed": {"aggregation.robust": "coordinate-median", **SHARED_A},
    **each("optimizer"),
    "server learning rate": {"aggregation.optimizer": "fedavg:learning-rate=0.5"},
    "server learning rate 1": {"aggregation.optimizer": "fedavg:learning-rate=1"},
    "8 bits": {"model.quantization": "8bit"},
    "ranks": {"lora.client-ranks": "4,8"},
    "equal ranks": {"lora.client-ranks": "8,8"},
    "node sums": {"wire.node-sum": True, **MEAN},
    "masks": {"secure.method": "masks"},
    "shares": {"secure.method": "shares"},
    "poisson": {"federation.selection": "poisson", "federation.cohort": 4},
    "weighted": {"federation.selection": "weighted"},
    "power of choice": {"federation.selection": "power-of-choice"},
    "oort": {"federation.selection": "oort:30"},
    "over-selection": {"federation.over-selection": 1.5},
    "late updates": {"federation.max-staleness": 2, **MEAN},
    "two updates a round": {"federation.min-clients": 2},
    "SCAFFOLD": {"train.control-variates": True, **MEAN},
    "no gradient clip": {"train.clip-norm": "off"},
    "private rows": {"privacy.epsilon": 8.0},
    "private clients": CENTRAL,
    "private clients, local noise": LOCAL,
    "private clients, coins": COINS,
    "noise multiplier": {"privacy.noise-multiplier": 1.0},
    "adaptive clip": {"privacy.clip": "adaptive"},
    "adaptive clip of clients": {"privacy.clip": "adaptive", **CENTRAL},
    "adaptive clip of rows": {"privacy.clip": "adaptive", "privacy.epsilon": 8.0},
    "weight cap of uniform weights": {"privacy.weight-cap": 9.0, "aggregation.weighting": "uniform"},
    "participations": {"privacy.max-participations": 2},
    "weight cap": {"privacy.weight-cap": 10.0},
    "nothing but deltas": {"privacy.metrics": "withheld"},
    "central noise": {"privacy.trust": "central"},
    "distributed noise": {"privacy.trust": "distributed"},
    "shares of noise": SHARES,
    "training on at home": {"personal.mode": "finetune"},
    "dual": {"personal.mode": "dual"},
    "ditto": {"personal.mode": "ditto"},
    "distillation": DISTIL,
    "distillation, clients judge": {**DISTIL, "distill.gate": "clients"},
    "distillation, screened": {**DISTIL, "distill.originality": "on"},
    "distillation of nothing": {**DISTIL, "distill.text": " "},
    "distillation of many texts": {**DISTIL, "distill.num-texts": 9999},
    "distillation of long texts": {**DISTIL, "distill.max-tokens": 9999},
    "no held-out share": {"data.held-out-fraction": 0.0},
    "no held-out rows": {"data.max-held-out": 0},
    "canaries": {"audit.canaries": 4},
    "short rows": {"train.max-length": 8},
}


def refusal(flat: dict[str, Any]) -> str:
    """Return why a configuration is refused, "" where it is not."""
    try:
        resolve(RunConfig.from_flat(flat))
    except ConfigError as error:
        return str(error)
    return ""


def refused_pairs() -> Iterator[tuple[str, str, str]]:
    """Yield (technique, other, sentence), with "" for the other of a technique that is refused alone."""
    alone = {name: refusal(keys) for name, keys in TECHNIQUES.items()}
    for name, sentence in alone.items():
        if sentence:
            yield name, "", sentence
    for one, other in combinations([name for name, sentence in alone.items() if not sentence], 2):
        first, second = TECHNIQUES[one], TECHNIQUES[other]
        agrees = all(first[key] == second[key] for key in first.keys() & second.keys())
        sentence = refusal({**first, **second}) if agrees else ""
        if sentence:
            yield one, other, sentence


def golden_text() -> str:
    """Return the content of refusals.txt."""
    lines = [f"{one}{' + ' if other else ''}{other}: {words}\n" for one, other, words in refused_pairs()]
    return "".join(lines)


if __name__ == "__main__":
    GOLDEN.write_text(golden_text())
