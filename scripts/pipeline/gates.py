"""Gates: what a new adapter must show before it replaces the one in use."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.config.key import key
from fedllm.errors import ConfigError
from fedllm.runs.folder import RESULT
from fedllm.runs.lineage import noted_clients
from fedllm.runs.memorisation import read_memorisation
from fedllm.runs.withdrawals import read_withdrawals, withdrawn_of

Gate: TypeAlias = dict[str, Any]  # "value", "limit" and "passed"; the value is None where it was not measured


@dataclass(frozen=True, kw_only=True)
class Limits:
    """[gates] of a pipeline: what a new adapter may at most cost and reveal."""

    worst_rise: float = key(
        0.0, "nats per token by which the largest held-out loss of a client may rise", at_least=0
    )
    epsilon: float | str = key("off", "epsilon of all runs of the pipeline together", words="off", above=0)
    extraction: float | str = key(
        "off", "share of training texts given back, above that of the controls", words="off", at_least=0
    )
    near_duplicates: float | str = key(
        "off", "share of training texts nearly repeated, above that of the controls", words="off", at_least=0
    )

    @property
    def is_audited(self) -> bool:
        """Whether a gate asks for what an audit measures."""
        return not (isinstance(self.extraction, str) and isinstance(self.near_duplicates, str))


@dataclass(frozen=True, kw_only=True)
class GateFigures:
    """What a finished run says of its adapter.

    `before` and `after` are held-out losses (nats per token) of the same clients, under the adapter that the
    run started from and under the one it gave. `epsilon` is None without a privacy plan; `memorisation` is
    that of the run's audit, empty where there was none; `withdrawn` counts the clients that took
    part and were withdrawn while the run went on.
    """

    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    memorisation: Mapping[str, float] = field(default_factory=dict)
    withdrawn: int = 0


def gate_figures(run_folder: Path) -> GateFigures:
    """Return what a finished run says of its adapter.

    Raises:
        ConfigError: the run has not finished, or a file of it is damaged.
        IntegrityError: a withdrawal in its folder is not as its site signed it.
    """
    try:
        result = json.loads((run_folder / RESULT).read_text())
        if result["status"] != "completed":
            raise ConfigError(f"{run_folder}: the run has not completed ({result.get('reason', '')})")
        ends = {name: dict(part["clients"]) for name, part in result["held_out"].items()}
        spent = result["privacy"]["epsilon"] if "privacy" in result else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{run_folder}: no run that has finished ({RESULT})") from None
    withdrawn = len(withdrawn_of(noted_clients(run_folder), read_withdrawals(run_folder)))
    found = read_memorisation(run_folder)
    return GateFigures(**ends, epsilon=spent, memorisation=found, withdrawn=withdrawn)


def judge(
    figures: GateFigures, limits: Limits, *, spent: float = 0.0, is_signed: bool | None = None
) -> dict[str, Gate]:
    """Return every gate by name.

    `spent` is the epsilon of the pipeline's earlier runs: those on the same rows add up. `is_signed` says
    whether the adapter that the run started from is as it was signed; None = it started from the base model.
    """
    gates = compare(figures.before, figures.after, limits.worst_rise)
    gates["withdrawn"] = _at_most(figures.withdrawn, 0)
    if not isinstance(limits.epsilon, str):
        total = None if figures.epsilon is None else spent + figures.epsilon
        gates["epsilon"] = _at_most(total, limits.epsilon)
    for name, limit in (("extraction", limits.extraction), ("near_duplicates", limits.near_duplicates)):
        if not isinstance(limit, str):
            gates[name] = _at_most(_above_controls(figures.memorisation, name), limit)
    if is_signed is not None:
        gates["signature"] = {"value": is_signed, "limit": True, "passed": is_signed}
    return gates


def compare(before: Mapping[str, float], after: Mapping[str, float], worst_rise: float) -> dict[str, Gate]:
    """Return the gates of held-out losses, over the clients that both have.

    "held-out": the mean gain must exceed its standard error over clients, else it may be chance.
    "worst-client": the largest loss of a client may not rise by more than `worst_rise`.
    """
    gains = [before[client] - after[client] for client in sorted(before.keys() & after.keys())]
    if len(gains) < 2 or not all(map(math.isfinite, gains)):  # one client has no standard error
        nothing = {"value": None, "limit": None, "passed": False}
        return {"held-out": nothing, "worst-client": {**nothing, "limit": worst_rise}}
    gain, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    largest = [max(losses[client] for client in before.keys() & after.keys()) for losses in (before, after)]
    return {
        "held-out": {"value": gain, "limit": error, "passed": gain > error},
        "worst-client": _at_most(largest[1] - largest[0], worst_rise),
    }


def passed(gates: Mapping[str, Gate]) -> bool:
    """Return whether all gates were passed."""
    return all(gate["passed"] for gate in gates.values())


def told(gates: Mapping[str, Gate]) -> str:
    """Return the gates that were not passed in a line, "" where all were."""
    failed = [
        f"{name} {_number(gate['value'])}, limit {_number(gate['limit'])}"
        for name, gate in gates.items()
        if not gate["passed"]
    ]
    return "; ".join(failed)


def _at_most(value: float | None, limit: float) -> Gate:
    return {"value": value, "limit": limit, "passed": value is not None and value <= limit}


def _above_controls(memorisation: Mapping[str, float], name: str) -> float | None:
    """Return by how much a share is above that of held-out texts and of the base model; None = unmeasured."""
    controls = [
        memorisation[f"{name}_{kind}"] for kind in ("held_out", "base") if f"{name}_{kind}" in memorisation
    ]
    return memorisation[name] - max(controls) if name in memorisation and controls else None


def _number(value: Any) -> str:
    return "not measured" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
