"""The values a round passes between its steps. Frozen; checked when built; no behaviour."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedllm.adapters.drift import Drift
from fedllm.adapters.layout import AdapterState
from fedllm.adapters.parts import PARTS, returned_part
from fedllm.errors import LayoutError

# The only numbers besides its delta that a client's update may carry.
UPDATE_METRICS = ("weight", "num_tokens", "train_loss", "num_truncated", "seconds")
PROXIMAL_SPACES = ("factor", "product")
EVALUATION_METRICS = ("loss", "personal_loss", "num_tokens", "num_rows")


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Numbers of one client's training in one round; `learning_rate` is already the round's."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    dropout: float = 0.0  # of the adapters' inputs
    proximal: float = 0.0  # strength mu of FedProx
    proximal_space: str = "factor"  # what it pulls: "factor" or "product"

    def __post_init__(self) -> None:
        if self.proximal_space not in PROXIMAL_SPACES:
            raise LayoutError(f"the proximal space is one of {', '.join(PROXIMAL_SPACES)}")


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What a node receives: which of its clients train, from where, and how.

    `num_drawn[i]` counts the rows that `client_ids[i]` drew in earlier rounds, so that a client whose
    process is new every time still sees all its rows before any twice. It trains the part `trained` of the
    first `ranks[i]` ranks of `adapter`, on the base model with `drift` added. With `local_b` every client
    starts from a B of its own, which never leaves it. With `node_sum` the node answers with one weighted
    mean of its clients' deltas. `control` is SCAFFOLD's c, where it is used
    (`fedllm.training.control_variates`). `clip` is the norm to which clients clip what they send, where the
    server noises their sum; else 0.
    """

    round_num: int
    client_ids: tuple[str, ...]
    num_drawn: tuple[int, ...]
    ranks: tuple[int, ...]
    adapter: AdapterState
    drift: Drift
    training: LocalTraining
    trained: str
    local_b: bool
    node_sum: bool
    codec: str
    weighting: str
    seed: int
    control: AdapterState | None = None
    clip: float = 0.0

    def __post_init__(self) -> None:
        number, full = len(self.client_ids), self.adapter.layout.rank
        if not number == len(set(self.client_ids)) == len(self.num_drawn) == len(self.ranks):
            raise LayoutError(
                "a train request names each client once, with its rank and the rows it has drawn"
            )
        if self.trained not in PARTS or (self.local_b and self.trained != "both"):
            raise LayoutError("a train request trains both factors, or a or b alone where no B is local")
        if not all(1 <= rank <= full for rank in self.ranks):
            raise LayoutError(f"a train request gives a client a rank outside 1 to {full}")
        if self.node_sum and set(self.ranks) != {full}:
            raise LayoutError("a train request asks for the sum of clients of different ranks")
        if self.control is not None and (self.local_b or self.node_sum or set(self.ranks) != {full}):
            raise LayoutError("a train request has control variates for updates that do not travel whole")

    @property
    def returned(self) -> str:
        """The part of a delta that travels back."""
        return returned_part(self.trained, self.local_b)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Which of a node's clients measure the held-out loss of `adapter` on the base model with `drift` added.

    With `local_b` every client measures its own B in place of the adapter's. `num_drawn`, as in a train
    request, names what a client keeps for itself: its B, its personal adapter. Without it there is none.
    """

    round_num: int
    client_ids: tuple[str, ...]
    adapter: AdapterState
    drift: Drift
    local_b: bool
    num_drawn: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_drawn and len(self.num_drawn) != len(self.client_ids):
            raise LayoutError("an evaluate request gives the rows each of its clients has drawn")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientUpdate:
    """What a client returns: `delta` [P_i] = after - before, its weight, and metrics from a fixed list.

    The delta is whole and of the client's own `rank`, with zeros where nothing was trained. An update with
    `members` is the weighted mean of several clients of one node: its weight is their sum, and each member
    holds its own numbers and no delta. `control_delta` [P] is the change of its control variate, where
    those are used.
    """

    client_id: str
    round_num: int
    rank: int
    delta: torch.Tensor
    weight: float
    num_tokens: int
    train_loss: float
    num_truncated: int = 0
    seconds: float = 0.0
    members: tuple["ClientUpdate", ...] = ()
    control_delta: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ClientEvaluation:
    """Held-out loss of one client: mean over its supervised tokens, in nats.

    `personal_loss` is with the client's personal adapter on top, None where it has none.
    """

    client_id: str
    loss: float
    num_tokens: int
    num_rows: int
    personal_loss: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class ClientFailure:
    """A client that has no result: `code` is one of `errors.CLIENT_ERROR_CODES` or a server-side verdict."""

    client_id: str
    code: str
    reason: str = ""  # the server's own words, never a client's


@dataclass(frozen=True, kw_only=True)
class JoinedClient:
    """What a client declares when it joins; its later weights may not exceed these sizes.

    A client without usable rows declares `num_train` 0 and is left out. `max_rank` is the largest rank its
    machine has room for, 0 = any.
    """

    client_id: str
    node_id: int
    num_train: int
    num_held_out: int
    fingerprint: str
    max_rank: int = 0


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
class RoundRecord:
    """What a round did; one line of `rounds.jsonl`. Losses are in nats per supervised token."""

    round_num: int
    attempt: int = 1
    asked: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)  # client -> reason
    weights: Mapping[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    train_losses: Mapping[str, float] = field(default_factory=dict)
    client_seconds: Mapping[str, float] = field(default_factory=dict)  # of training, as clients report it
    staleness: Mapping[str, int] = field(default_factory=dict)  # late client -> rounds by which it was late
    held_out: Mapping[str, float] = field(default_factory=dict)  # client -> loss after this round
    personal_held_out: Mapping[str, float] = field(default_factory=dict)  # with its personal adapter on top
    num_tokens: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    trained: str = "both"  # or the factor that was trained alone, a or b
    applied: bool = True  # false where too few updates were accepted and the adapter stayed as it was
    delta_norm: float = 0.0
    rho: float | None = None  # aggregation error of factor averaging over the norm of the round's change
    largest_rho: float | None = None  # the same of the worst single matrix
    kept_energy: float | None = None  # share of the exact mean's squared norm that the read-out keeps
    silenced: tuple[str, ...] = ()  # clients to whom the robust rule left less than a tenth of their weight
    distil: DistilRecord | None = None  # the distillation step, in rounds that have one
    adapter: str = ""  # digest of the adapter after this round
    epsilon: float | None = None  # spent by the run so far, of the unit that spent most; None = no privacy
    noise_multiplier: float | None = None  # of this round; the largest where clients differ
    clip: float | None = None  # norm to which updates, or the gradients of rows, were clipped

    @property
    def mean_held_out(self) -> float | None:
        """Mean over clients of the held-out loss, or None where it was not measured."""
        return sum(self.held_out.values()) / len(self.held_out) if self.held_out else None
