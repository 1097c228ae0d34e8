"""Round records as JSON lines."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from fedllm.errors import CheckpointError
from fedllm.messages import ClientAtHome, LocalTraining


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """What a round will do. `asked` may exceed `cohort_size` (over-selection); `ranks` has one for each.

    `voices` names the site of every client, and `most_weights` bounds what it weighs; where both are empty
    every client speaks for itself.

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
    deadline: float  # seconds that it waits for replies
    voices: Mapping[str, str] = field(default_factory=dict)
    most_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What a server optimizer remembers: moments [P] of the pseudo-gradient; empty before its first step."""

    first: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    second: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    num_steps: int = 0


@dataclass(frozen=True)
class LossChange:
    """A mean loss in nats per token: the aggregate's, and the distilled adapter's (NaN if it diverged)."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class DistillationTexts:
    """What a distillation step taught on, and what its losses are measured on."""

    kind: str = ""  # synthetic | public | both
    held_out_kind: str = ""  # synthetic | public
    number: int = 0
    num_held_out: int = 0
    num_removed: int = 0  # left out as copies or near copies of held-out texts
    num_written: int = 0  # synthetic texts that the clients' adapters wrote to distil on
    num_refused: int = 0  # of those written, by a gate of originality


@dataclass(frozen=True, kw_only=True)
class DistillationTeachers:
    """Who taught, and how sure they were."""

    kind: str = ""  # posterior | uniform | logit-mean: the one that taught
    number: int = 0
    entropy: float | None = None  # of their mixed predictions, mean in nats
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # domain -> client -> mean


@dataclass(frozen=True, kw_only=True)
class DistillationLosses:
    """Losses in nats per token; None where something was not measured."""

    base: float  # of the base model on the held-out texts
    ensemble: float  # of the teacher there, which sees no token before it predicts it
    held_out: LossChange
    error: float | None = None  # standard error of that change, over the held-out texts
    control: float | None = None  # of the aggregate fine-tuned on the same texts for as many tokens
    domains: Mapping[str, LossChange] = field(default_factory=dict)  # of the held-out texts of each domain
    own: LossChange | None = None  # on texts that the clients' adapters write, measured next to public text
    clients: LossChange | None = None  # mean of what clients report for their own held-out rows

    @property
    def gap_closed(self) -> float | None:
        """Share of the way from the aggregate to the ensemble that the student went; None where unknown."""
        gap = self.held_out.before - self.ensemble
        if not gap > 0 or math.isnan(self.held_out.after):
            return None
        return (self.held_out.before - self.held_out.after) / gap


@dataclass(frozen=True, kw_only=True)
class DistillationRecord:
    """What the distillation step of a round did (`strategies.distillation`), and why.

    Where `kept` is false the aggregate stayed as it was. `losses` is None where the step failed before it had
    measured any.
    """

    kept: bool
    reason: str
    texts: DistillationTexts = field(default_factory=DistillationTexts)
    teachers: DistillationTeachers = field(default_factory=DistillationTeachers)
    losses: DistillationLosses | None = None
    num_tokens: int = 0  # that the student learnt from
    target_bytes: int = 0  # of the teacher's predictions in memory
    seconds: float = 0.0


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
class SecureRecord:
    """How a round's updates became sums that nobody sees through: numbers of parties, over all its sums.

    `threshold` of `parties` must answer to the end; `answered` are in the sums, `opened` gave shares of the
    masks in a second exchange of so many `seconds`. `faults` says of parties how they broke the protocol.
    """

    method: str
    parties: int
    threshold: int
    answered: int
    opened: int
    seconds: float
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HomeRecord:
    """What training on at home gave after the last round (personal.mode = "finetune"), by client.

    Losses are as in `ClientAtHome`; `steps` are those that were chosen. All are empty where clients keep them
    for themselves.
    """

    alone: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    home: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Iterable[ClientAtHome]) -> "HomeRecord":
        """Return the record of what clients report, by name, so that it does not tell who was quick."""
        by_name = {answer.client_id: answer for answer in answers}
        by_name = {name: by_name[name] for name in sorted(by_name)}
        return cls(
            alone={name: answer.alone for name, answer in by_name.items()},
            shared={name: answer.shared for name, answer in by_name.items()},
            home={name: answer.home for name, answer in by_name.items()},
            steps={name: answer.steps for name, answer in by_name.items()},
        )

    @property
    def gained(self) -> tuple[str, ...]:
        """The clients that have more of joining, and training on, than of training alone."""
        return tuple(client for client, loss in self.home.items() if loss < self.alone[client])

    def to_result(self) -> dict[str, Any]:
        """Return the section `at_home` of `result.json`, where at least one client has reported."""
        losses = {"alone": self.alone, "shared": self.shared, "home": self.home}
        return {
            "clients": {
                client: {**{name: column[client] for name, column in losses.items()}, "steps": steps}
                for client, steps in self.steps.items()
            },
            "mean": {name: sum(column.values()) / len(column) for name, column in losses.items()},
            "gained": len(self.gained) / len(self.home),
        }


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What a round did; one line of `rounds.jsonl`. Round 0 is the base model before any training."""

    round_num: int
    attempt: int = 1
    asked: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)  # client -> reason
    codes: Mapping[str, str] = field(default_factory=dict)  # lost client -> the code that stands for it
    unsent: tuple[str, ...] = ()  # of the lost, those who reported that they have no update
    weights: Mapping[str, float] = field(default_factory=dict)
    staleness: Mapping[str, int] = field(default_factory=dict)  # late client -> rounds by which it was late
    applied: bool = True  # false where too few updates were accepted and the adapter stayed as it was
    adapter: str = ""  # digest of the adapter after this round
    bytes_down: int = 0
    bytes_up: int = 0
    deadline: float = 0.0  # seconds that it would have waited for replies
    seconds: float = 0.0
    training: TrainingRecord = TrainingRecord()
    aggregation: AggregationRecord = AggregationRecord()
    privacy: PrivacyRecord | None = None  # under a privacy plan
    secure: SecureRecord | None = None  # where the server sees sums alone
    distillation: DistillationRecord | None = None  # in rounds with a distillation step
    held_out: Mapping[str, float] = field(default_factory=dict)  # client -> loss after this round
    personal_held_out: Mapping[str, float] = field(default_factory=dict)  # with its personal adapter on top
    not_finite: tuple[str, ...] = ()  # clients that could report no finite held-out loss
    at_home: HomeRecord | None = None  # in the last round, once clients have trained on

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
        record: RoundRecord = _read(RoundRecord, {"round_num": values["round"], **fields})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"not a round's record of this version of fedllm ({error}); read it with the one that wrote it"
        ) from None
    return record


def record_to_line(record: RoundRecord) -> str:
    """Return one line of `rounds.jsonl`."""
    return json.dumps(record_to_dict(record), separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _read(kind: Any, value: Any) -> Any:
    """Return a JSON value as the type a field is declared with; dataclasses may nest."""
    if value is None:
        return math.nan if kind is float else None  # `_plain` wrote a number that is not finite as null
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _read(hints[name], item) for name, item in dict(value).items()})  # type: ignore[operator]
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:  # `X | None`
        return _read(parts[0], value)
    if origin is Mapping:
        return {key: _read(parts[1], item) for key, item in value.items()}
    return tuple(value) if origin is tuple else value
