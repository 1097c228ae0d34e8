"""What every key of a run may be: the names it takes, or the range of its number."""

import math
from collections.abc import Mapping
from typing import Any

from fedllm import rule
from fedllm.errors import ConfigError
from fedllm.privacy import plan

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "float32", "bfloat16", "float16", "float64"),
    "model.quantization": ("none", "8bit", "4bit"),
    "data.on-bad-row": ("skip", "stop"),
    "federation.selection": ("uniform", "weighted", "poisson", "power-of-choice", "oort"),
    "train.schedule": ("constant", "cosine"),
    "lora.init-a": ("auto", "kaiming", "orthonormal"),
    "aggregation.preset": ("", *rule.PRESETS),
    "aggregation.train": rule.TRAIN,
    "aggregation.read-out": rule.READ_OUTS,
    "aggregation.weighting": rule.WEIGHTINGS,
    "aggregation.robust": rule.ROBUST_RULES,
    "aggregation.optimizer": rule.OPTIMIZERS,
    "train.proximal-space": ("factor", "product"),
    "privacy.unit": plan.UNITS,
    "privacy.trust": plan.TRUSTS,
    "privacy.metrics": plan.METRICS,
    "personal.mode": ("none", "dual", "ditto"),
    "distill.when": ("never", "last", "every"),
    "distill.teacher": ("posterior", "uniform", "logit-mean"),
    "distill.originality": ("auto", "on", "off"),
    "distill.gate": ("auto", "public", "clients"),
    "wire.codec": ("fp32", "bf16", "int8"),
}

# key -> (lowest, highest, whether the lowest itself is refused)
RANGES: dict[str, tuple[float, float, bool]] = {
    "seed": (0, 2**63 - 1, False),
    "model.num-threads": (0, 1024, False),
    "lora.rank": (1, 4096, False),
    "lora.alpha": (0, math.inf, True),
    "lora.dropout": (0, 0.99, False),
    "data.held-out-fraction": (0, 0.9, False),
    "data.max-held-out": (0, math.inf, False),
    "data.max-rows": (0, math.inf, False),
    "federation.num-clients": (1, 1_000_000, False),
    "federation.num-rounds": (1, 1_000_000, False),
    "federation.cohort-size": (0, 1_000_000, False),
    "federation.cohort-fraction": (0, 1, True),
    "federation.candidates": (0, 1_000_000, False),
    "federation.preferred-seconds": (0, math.inf, False),
    "federation.over-selection": (1, 10, False),
    "federation.max-staleness": (0, 1000, False),
    "federation.min-clients": (1, 1_000_000, False),
    "federation.round-deadline": (0, math.inf, True),
    "federation.join-deadline": (0, math.inf, True),
    "federation.max-retries": (0, 1000, False),
    "federation.max-failure-rate": (0, 1, False),
    "train.local-steps": (1, 1_000_000, False),
    "train.batch-size": (1, 1_000_000, False),
    "train.learning-rate": (0, math.inf, True),
    "train.weight-decay": (0, math.inf, False),
    "train.clip-norm": (0, math.inf, False),
    "train.proximal": (0, math.inf, False),
    "train.max-length": (8, 10_000_000, False),
    "train.token-budget": (0, 100_000_000, False),
    "aggregation.max-malicious": (0, 0.5, False),
    "aggregation.server-learning-rate": (0, math.inf, False),
    "aggregation.server-momentum": (0, 0.9999, False),
    "aggregation.second-moment": (0, 0.9999, False),
    "aggregation.adaptivity": (0, math.inf, True),
    "aggregation.staleness-exponent": (0, 100, False),
    "privacy.epsilon": (0, 1e6, False),
    "privacy.delta": (0, 0.5, True),
    "privacy.clip": (0, math.inf, True),
    "privacy.noise-multiplier": (0, 1e6, False),
    "privacy.max-participations": (0, 1_000_000, False),
    "privacy.weight-cap": (0, math.inf, False),
    "audit.canaries": (0, 100_000, False),
    "audit.canary-tokens": (2, 10_000_000, False),
    "personal.rank": (1, 4096, False),
    "personal.steps": (1, 1_000_000, False),
    "personal.pull": (0, math.inf, False),
    "distill.num-texts": (2, 10_000_000, False),
    "distill.max-tokens": (8, 10_000_000, False),
    "distill.steps": (1, 1_000_000, False),
    "distill.batch-size": (1, 1_000_000, False),
    "distill.learning-rate": (0, math.inf, True),
    "distill.top-k": (1, 1_000_000, False),
    "distill.temper": (0, 100, False),
    "distill.pull": (0, math.inf, False),
    "distill.max-teachers": (1, 100_000, False),
    "evaluation.every": (0, 1_000_000, False),
    "evaluation.max-new-tokens": (0, 100_000, False),
}


def check_limits(flat: Mapping[str, Any]) -> None:
    """Refuse flat keys of which one has a value that it may not have.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            named = ", ".join(choice for choice in allowed if choice)
            raise ConfigError(f"{key} = {flat[key]!r}: expected one of {named}")
    for key, (low, high, open_below) in RANGES.items():
        value: Any = flat[key]
        infinite = isinstance(value, float) and not math.isfinite(value)
        if infinite or value < low or value > high or (open_below and value == low):
            bounds = f"{'above' if open_below else 'at least'} {low:g}"
            bounds += "" if math.isinf(high) else f" and at most {high:g}"
            bounds = f"finite and {bounds}" if infinite else bounds
            raise ConfigError(f"{key} = {flat[key]!r}: expected a value {bounds}")
