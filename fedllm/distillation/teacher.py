"""The teacher: the ensemble of client adapters on the base model that all of them share.

All adapters read the same rows on the fused engine. What is kept of a pass is the hidden state where a token
is predicted, a few kilobytes; the laws over the vocabulary are made from it for a few tokens at a time, mixed
(`fedllm.distillation.teacher`) and cut down to what a student needs (`fedllm.distillation.targets`).
Tensor suffixes: K teacher, P flat adapter, N predicted token, T predicted token of one row, D feature.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.distillation.targets import Targets, learnt_tokens
from fedllm.engine.engine import Engine
from fedllm.engine.head import CHUNK
from fedllm.engine.passes import MAX_ADAPTERS, packed
from fedllm.errors import ConfigError, LayoutError, NoDataError, NonFiniteError
from fedllm.models.chat import Encoded

KINDS = ("posterior", "uniform", "logit-mean")


@dataclass(frozen=True, eq=False)
class Mixing:
    """How teachers are mixed, those left out by a prior of 0. See the module for the kinds.

    `floor` is the share of all weight that is dealt evenly, so that nobody is ever out: w <- (1 - floor) w +
    floor / K.
    """

    kind: str
    log_priors_K: torch.Tensor  # float64; -inf leaves a teacher out
    temper: float = 1.0
    floor: float = 0.0

    def without(self, dead_K: torch.Tensor) -> "Mixing":
        """Return the same with teachers left out, on the device of `dead_K`."""
        priors_K = self.log_priors_K.to(dead_K.device).masked_fill(dead_K, -torch.inf)
        return Mixing(self.kind, priors_K, self.temper, self.floor)

    def weights(self, log_probs_TK: torch.Tensor, evidence_K: torch.Tensor) -> torch.Tensor:
        """Return the weights [T, K] in float64 for the next T tokens of a row.

        `log_probs_TK` is what each teacher gave these tokens, `evidence_K` the sum over those before them.
        """
        if self.kind == "posterior":
            return causal_weights(log_probs_TK, self.log_priors_K, self.temper, evidence_K, self.floor)
        present_K = self.log_priors_K.isfinite().double()
        return (present_K / present_K.sum()).expand(len(log_probs_TK), -1)


def mixture_weights(
    log_probs_NK: torch.Tensor,
    log_priors_K: torch.Tensor,
    temper: float = 1.0,
    row_starts: Sequence[int] = (0,),
    floor: float = 0.0,
) -> torch.Tensor:
    """Return the posterior weights [N, K] in float64 for tokens of rows that begin at `row_starts`."""
    nothing_K = torch.zeros_like(log_priors_K, dtype=torch.float64)
    ends = [*row_starts[1:], len(log_probs_NK)]
    parts = [
        causal_weights(log_probs_NK[begin:end], log_priors_K, temper, nothing_K, floor)
        for begin, end in zip(row_starts, ends, strict=True)
    ]
    return torch.cat(parts)


def causal_weights(
    log_probs_TK: torch.Tensor,
    log_priors_K: torch.Tensor,
    temper: float,
    evidence_K: torch.Tensor,
    floor: float = 0.0,
) -> torch.Tensor:
    """Return the posterior weights [T, K] in float64 of one row's tokens, given those before them.

    Where the text is impossible to every teacher the priors decide.
    """
    log_probs_TK, log_priors_K = log_probs_TK.double(), log_priors_K.double()
    before_TK = log_probs_TK.cumsum(dim=0).roll(1, dims=0)
    before_TK[:1] = 0.0
    scores_TK = log_priors_K.expand_as(before_TK)
    if temper:  # 0 * -inf is no number
        scores_TK = scores_TK + temper * (before_TK + evidence_K)
    impossible_T1 = scores_TK.isneginf().all(dim=1, keepdim=True)
    weights_TK = torch.where(impossible_T1, log_priors_K, scores_TK).softmax(dim=1)
    if floor:
        present_K = log_priors_K.isfinite().double()
        weights_TK = (1 - floor) * weights_TK + floor * present_K / present_K.sum()
    return weights_TK


@dataclass(frozen=True, eq=False)
class Mixed:
    """What an ensemble says of T tokens."""

    law_TV: torch.Tensor  # probabilities
    target_T: torch.Tensor  # log-probability of the token that follows
    weights_TK: torch.Tensor  # float64
    evidence_K: torch.Tensor  # float64, of the row up to and with these tokens


def mix(logits_KTV: torch.Tensor, targets_T: torch.Tensor, mixing: Mixing, evidence_K: torch.Tensor) -> Mixed:
    """Return what the ensemble says of the next T tokens of a row; the logits are overwritten.

    Logits must be finite, those of teachers that are left out too.
    """
    index_KT1 = targets_T.expand(len(logits_KTV), -1)[:, :, None]
    logits_KTV.sub_(logits_KTV.logsumexp(dim=2, keepdim=True))
    said_TK = logits_KTV.gather(2, index_KT1)[:, :, 0].T.double()
    weights_TK = mixing.weights(said_TK, evidence_K)
    shares_TK = weights_TK.to(logits_KTV.dtype)
    if (
        mixing.kind == "logit-mean"
    ):  # log-probabilities differ from logits by what the softmax takes out again
        log_law_TV = torch.einsum("tk,ktv->tv", shares_TK, logits_KTV).log_softmax(dim=1)
        law_TV, target_T = log_law_TV.exp(), log_law_TV.gather(1, targets_T[:, None])[:, 0]
    else:
        law_TV = torch.einsum("tk,ktv->tv", shares_TK, logits_KTV.exp_())
        target_T = (said_TK + weights_TK.log()).logsumexp(dim=1)
    return Mixed(law_TV, target_T, weights_TK, evidence_K + said_TK.sum(dim=0))


STATE_BYTES = 128 * 2**20  # of all teachers' hidden states that are kept at a time
ADAPTER_BYTES = 512 * 2**20  # of the adapters on the model at a time, where nobody says how many


@dataclass(frozen=True, eq=False)
class Teacher:
    """K adapters [P] of one layout and how they are mixed; see `fedllm.distillation.teacher` for the kinds.

    `priors` [K] are weights of any sum, such as the clients' numbers of rows; only `posterior` uses them.

    Raises:
        ConfigError: the kind is unknown, or temper, floor or a prior is out of range.
        LayoutError: there is no adapter, or one that does not fit the layout.
    """

    adapters: tuple[torch.Tensor, ...]
    layout: AdapterLayout
    priors: torch.Tensor
    kind: str = "posterior"
    temper: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"a teacher is one of {', '.join(KINDS)}, not {self.kind!r}")
        if not (0 <= self.temper < float("inf") and 0 <= self.floor <= 1):
            raise ConfigError("a teacher's temper is at least 0 and its floor between 0 and 1")
        if not self.adapters or any(vector.shape != (self.layout.size,) for vector in self.adapters):
            raise LayoutError(f"a teacher needs adapters of {self.layout.size} values each, at least one")
        if self.priors.shape != (len(self.adapters),):
            raise ConfigError("a teacher needs one prior for each of its adapters")
        if not (bool(self.priors.isfinite().all()) and bool((self.priors > 0).all())):
            raise ConfigError("a teacher's priors are positive numbers")


@torch.no_grad()
def teach(
    engine: Engine,
    teacher: Teacher,
    rows: Sequence[Encoded],
    *,
    top_k: int,
    teachers_at_once: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Targets:
    """Return what the teacher says of every learnt token of `rows`, its `top_k` likeliest tokens each.

    A token with label -100 is context: it is neither predicted nor evidence of whose text this is. At most
    `teachers_at_once` adapters are on the model at a time (0 = as many as fit in 512 MiB); fewer where the
    GPU runs out of memory. That changes rounding and speed, nothing else. An adapter that is not finite, or
    that gives numbers that are not, has no weight where it does and is named in `Targets.silenced`. `dtype`
    is what log-probabilities are kept in; float64 keeps everything, for exactness tests.

    Raises:
        ConfigError: `top_k` is less than 1.
        NoDataError: no row has a token to learn.
        NonFiniteError: no adapter is finite, or none on some row.
    """
    taught = tuple(row for row in rows if row.num_supervised)
    if top_k < 1:
        raise ConfigError(f"distillation keeps at least 1 likeliest token, not {top_k}; raise distill.top-k")
    if not taught:
        raise NoDataError("distillation: no row of its text has a token to learn; give it longer texts")
    sound = _sound(teacher, engine.base.dtype)
    ensemble = _Ensemble(engine, teacher, sound, teachers_at_once or _at_once(teacher))
    pieces: list[_Piece] = []
    silenced = set(range(len(teacher.adapters))) - set(sound)
    for block in packed(taught, [ensemble.state_bytes(row) for row in taught], STATE_BYTES):
        states_KND = ensemble.states(block)
        lengths = [row.num_supervised for row in block]
        for row, states_KTD in zip(block, torch.split(states_KND, lengths, dim=1), strict=True):
            dead_K = ~states_KTD.isfinite().all(dim=2).all(dim=1)
            silenced |= {sound[place] for place in dead_K.nonzero()[:, 0].tolist()}
            pieces += [_kept(mixed, top_k, dtype) for mixed in ensemble.say(row, states_KTD, dead_K)]
    return _joined(taught, pieces, sound, tuple(sorted(silenced)), len(teacher.adapters))


def _sound(teacher: Teacher, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the places of the adapters that are finite in the dtype the base model computes in."""
    sound = [n for n, vector in enumerate(teacher.adapters) if bool(vector.to(dtype).isfinite().all())]
    if not sound:
        raise NonFiniteError("distillation: no client's adapter is finite, so there is nobody to learn from")
    return tuple(sound)


def _at_once(teacher: Teacher) -> int:
    return max(1, min(MAX_ADAPTERS, ADAPTER_BYTES // (4 * teacher.layout.size)))


@dataclass(frozen=True, eq=False)
class _Ensemble:
    """The finite adapters of a teacher on an engine."""

    engine: Engine
    teacher: Teacher
    sound: tuple[int, ...]
    at_once: int

    def state_bytes(self, row: Encoded) -> int:
        """Return the bytes of all adapters' states for a row."""
        weight_VD = self.engine.passes.head.weight_VD
        text_config = self.engine.base.model.config.get_text_config()
        width = text_config.vocab_size if weight_VD is None else weight_VD.shape[1]
        return len(self.sound) * row.num_supervised * width * self.engine.base.dtype.itemsize

    def states(self, rows: Sequence[Encoded]) -> torch.Tensor:
        """Return every adapter's states at the learnt tokens of `rows`, [K, N, D]."""
        adapters = [self.teacher.adapters[place] for place in self.sound]
        return _in_groups(
            lambda group: self.engine.read(self.teacher.layout, group, rows),
            adapters,
            min(self.at_once, len(adapters)),
        )

    def say(self, row: Encoded, states_KTD: torch.Tensor, dead_K: torch.Tensor) -> Iterator[Mixed]:
        """Yield what the ensemble says of a row's tokens, a few at a time: [CHUNK, V] numbers in all."""
        device = states_KTD.device
        if bool(dead_K.all()):
            raise NonFiniteError(
                "distillation: no client's adapter gives finite numbers on a row of the text"
            )
        priors = self.teacher.priors.double()[list(self.sound)]
        mixing = Mixing(self.teacher.kind, priors.log(), self.teacher.temper, self.teacher.floor)
        mixing = mixing.without(dead_K)
        states_KTD = states_KTD.masked_fill(dead_K[:, None, None], 0.0)  # 0 times it must be 0
        targets_T = torch.tensor(learnt_tokens(row), device=device)
        evidence_K = torch.zeros(len(self.sound), dtype=torch.float64, device=device)
        step = max(1, CHUNK // len(self.sound))
        for begin in range(0, len(targets_T), step):
            part = slice(begin, begin + step)
            logits_KTV = self.engine.passes.head.logits(states_KTD[:, part])
            mixed = mix(logits_KTV, targets_T[part], mixing, evidence_K)
            evidence_K = mixed.evidence_K
            yield mixed


def _in_groups(
    read: Callable[[Sequence[torch.Tensor]], torch.Tensor], adapters: Sequence[torch.Tensor], at_once: int
) -> torch.Tensor:
    """Return what `read` gives for all adapters, read in groups that get smaller while memory runs out."""
    try:
        groups = [adapters[begin : begin + at_once] for begin in range(0, len(adapters), at_once)]
        return torch.cat([read(group) for group in groups])
    except torch.OutOfMemoryError:
        if at_once == 1:
            raise
    torch.cuda.empty_cache()
    return _in_groups(read, adapters, at_once // 2)


@dataclass(frozen=True, eq=False)
class _Piece:
    """What is kept of a few tokens, see `Targets`, and the log-probability of each token itself."""

    ids_Tk: torch.Tensor
    log_probs_Tk: torch.Tensor
    tail_T: torch.Tensor
    entropy_T: torch.Tensor
    weights_TK: torch.Tensor
    target_T: torch.Tensor


def _kept(mixed: Mixed, top_k: int, dtype: torch.dtype) -> _Piece:
    """Return the likeliest tokens of a law, which is overwritten, and one number for all others."""
    law_TV = mixed.law_TV
    # Exactness tests keep everything in float64.
    other = torch.float64 if dtype == torch.float64 else torch.float32
    entropy_T = torch.special.entr(law_TV).sum(dim=1)
    kept_Tk, ids_Tk = law_TV.topk(min(top_k, law_TV.shape[1]), dim=1)
    tail_T = law_TV.scatter_(1, ids_Tk, 0.0).sum(dim=1)  # never below 0, as 1 minus the kept ones can be
    return _Piece(
        ids_Tk.int().cpu(),
        kept_Tk.clamp(min=torch.finfo(kept_Tk.dtype).tiny)
        .log()
        .to(dtype)
        .cpu(),  # finite, whatever underflows
        tail_T.to(other).cpu(),
        entropy_T.to(other).cpu(),
        mixed.weights_TK.to(other).cpu(),
        mixed.target_T.double().cpu(),
    )


def _joined(
    rows: tuple[Encoded, ...],
    pieces: Sequence[_Piece],
    sound: Sequence[int],
    silenced: tuple[int, ...],
    num_teachers: int,
) -> Targets:
    """Return the pieces of all rows as one value; a teacher that was never asked has weight 0."""
    weights_NS = torch.cat([piece.weights_TK for piece in pieces])
    weights_NK = weights_NS.new_zeros(len(weights_NS), num_teachers)
    weights_NK[:, list(sound)] = weights_NS
    return Targets(
        rows=rows,
        ids_Nk=torch.cat([piece.ids_Tk for piece in pieces]),
        log_probs_Nk=torch.cat([piece.log_probs_Tk for piece in pieces]),
        tail_N=torch.cat([piece.tail_T for piece in pieces]),
        entropy_N=torch.cat([piece.entropy_T for piece in pieces]),
        weights_NK=weights_NK,
        loss=-float(torch.cat([piece.target_T for piece in pieces]).mean()),
        silenced=silenced,
    )
