"""Round records as JSON lines."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, get_args, get_type_hints

import torch

from fedllm.errors import CheckpointError
from fedllm.messages import LocalTraining


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """What a round will do. `asked` may exceed `cohort_size` (over-selection); `ranks` has one for each.

    The round closes with `cohort_size` updates. It is 0 where a Poisson draw chose fewer clients than a round
    needs: then nobody is asked, the round changes nothing and has not failed.
    """

    round_num: int
    attempt: int
    asked: tuple[str, ...]
    cohort_size: int
    ranks: Mapping[str, int]
    training: LocalTraining
    trained: str  # the part that clients train, see fedllm.adapters.parts
    returned: str  # the part of their delta that they send
    largest_start: float  # largest absolute value of the adapter the round starts from


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What a server optimizer remembers: moments [P] of the pseudo-gradient; empty before its first step."""

    first: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    second: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    num_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class DistilRecord:
    """What the distillation step of a round did (`strategies.distillation`).

    Losses are in nats per token of the texts held out from it; a number is None where it was not measured.
    The other way round of `kept` is that the aggregate stayed as it was, and `reason` says why.
    """

    kept: bool
    reason: str
    teacher: str = ""  # posterior | uniform | logit-mean: the one that taught
    text: str = ""  # synthetic | public | both: what it taught on
    held_out_text: str = ""  # synthetic | public: what the losses are measured on
    num_teachers: int = 0
    num_texts: int = 0
    num_held_out: int = 0
    num_removed: int = 0  # texts left out, being copies or near copies of held-out ones
    num_written: int = 0  # synthetic texts that the clients' adapters wrote to distil on
    num_refused: int = 0  # of these, by a gate of originality
    base: float | None = None  # loss of the base model
    before: float | None = None  # of the aggregate
    after: float | None = None  # of the distilled adapter
    error: float | None = None  # standard error of that change, over the held-out texts
    own_before: float | None = None  # of the aggregate on texts of the clients' adapters, beside public text
    own_after: float | None = None
    ensemble: float | None = None  # of the teacher itself: the ceiling
    control: float | None = None  # of the aggregate fine-tuned on the same texts for as many tokens
    entropy: float | None = None  # of the teacher's predictions, mean in nats
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # domain -> client -> mean
    domains_before: Mapping[str, float] = field(default_factory=dict)  # domain -> loss of the aggregate
    domains_after: Mapping[str, float] = field(default_factory=dict)  # and of the distilled adapter
    clients_before: float | None = None  # mean held-out loss that clients report of the aggregate
    clients_after: float | None = None
    num_tokens: int = 0  # that the student learnt from
    target_bytes: int = 0  # of the teacher's predictions in memory
    seconds: float = 0.0

    @property
    def gap_closed(self) -> float | None:
        """Share of the way from the aggregate to the ensemble that the student went; None where unknown."""
        if self.before is None or self.after is None or self.ensemble is None:
            return None
        gap = self.before - self.ensemble
        return (self.before - self.after) / gap if gap > 0 else None


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What the clients report of their training. Losses are in nats per supervised token.

    A privacy plan may withhold what clients report: then there are no losses, seconds and tokens.
    """

    loss: float | None = None  # weighted mean over clients
    losses: Mapping[str, float] = field(default_factory=dict)  # client -> loss
    seconds: Mapping[str, float] = field(default_factory=dict)  # client -> seconds
    num_tokens: int = 0
    learning_rate: float = 0.0
    trained: str = "both"  # or the factor that was trained alone, a or b


@dataclass(frozen=True, kw_only=True)
class AggregationRecord:
    """What combining the updates measured (`strategies.aggregation`); None stands for unknown."""

    delta_norm: float = 0.0  # Frobenius norm of the change of the products B A
    rho: float | None = None  # error of averaging the factors, as a share of the round's change
    largest_rho: float | None = None  # the same of the worst single matrix
    kept_energy: float | None = None  # share of the exact mean's squared norm that the read-out keeps
    silenced: tuple[str, ...] = ()  # clients to whom the robust rule left less than a tenth of their weight


@dataclass(frozen=True, kw_only=True)
class PrivacyRecord:
    """What a round of a private run spent and used."""

    epsilon: float  # spent by the run so far, of the unit that spent most
    noise_multiplier: float | None  # of this round; the largest where clients differ
    clip: float  # norm to which updates, or the gradients of rows, were clipped


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What a round did; one line of `rounds.jsonl`. Round 0 is the base model before any training."""

    round_num: int
    attempt: int = 1
    asked: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)  # client -> reason
    weights: Mapping[str, float] = field(default_factory=dict)
    staleness: Mapping[str, int] = field(default_factory=dict)  # late client -> rounds by which it was late
    applied: bool = True  # false where too few updates were accepted and the adapter stayed as it was
    adapter: str = ""  # digest of the adapter after this round
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    training: TrainingRecord = TrainingRecord()
    aggregation: AggregationRecord = AggregationRecord()
    privacy: PrivacyRecord | None = None  # under a privacy plan
    distillation: DistilRecord | None = None  # in rounds with a distillation step
    held_out: Mapping[str, float] = field(default_factory=dict)  # client -> loss after this round
    personal_held_out: Mapping[str, float] = field(default_factory=dict)  # with its personal adapter on top

    @property
    def mean_held_out(self) -> float | None:
        """Mean over clients of the held-out loss, or None where it was not measured."""
        return sum(self.held_out.values()) / len(self.held_out) if self.held_out else None


def record_to_dict(record: RoundRecord) -> dict[str, Any]:
    """Return a JSON-ready form of a record; numbers that are not finite become null."""
    values = _plain(asdict(record))
    return {"round": values.pop("round_num"), **values, "mean_held_out": _plain(record.mean_held_out)}


def record_from_dict(values: Mapping[str, Any]) -> RoundRecord:
    """Return the record that `record_to_dict` wrote.

    Raises:
        CheckpointError: it is no record, or one of another version of fedllm.
    """
    try:
        fields = {name: value for name, value in values.items() if name not in {"round", "mean_held_out"}}
        record: RoundRecord = _typed(RoundRecord, {"round_num": values["round"], **fields})
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"not a round's record of this version of fedllm ({error}); read it with the one that wrote it"
        ) from None
    return record


def record_to_line(record: RoundRecord) -> str:
    """Return one line of `rounds.jsonl`."""
    return json.dumps(record_to_dict(record), separators=(",", ":"), allow_nan=False)


def _typed(kind: Any, value: Any) -> Any:
    """Return a value read from JSON as the type of its field: nested records and tuples."""
    for option in (kind, *get_args(kind)):  # X, or one of X | None
        if isinstance(option, type) and is_dataclass(option) and isinstance(value, dict):
            kinds = get_type_hints(option)
            return option(**{name: _typed(kinds[name], item) for name, item in value.items()})
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
