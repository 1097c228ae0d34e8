"""The teacher: client adapters as one ensemble, mixed token by token into one prediction of the next token.

All adapters read the same rows on the fused engine. A pass keeps only the hidden states where a token is
predicted, a few kilobytes each. The distributions over the vocabulary are made from them for a few tokens at
a time, mixed, and cut down to what a student needs (`fedllm.distillation.targets`). Three ways to mix, with
w_k the weight of teacher k and p_k its distribution:

    posterior   sum_k w_k p_k, w_k in proportion to prior_k p_k(the row so far)^temper: whoever predicted the
                text well so far counts. At temper 1 this is the exact model of the pooled text, the mixture
                sum_k prior_k p_k(text)
    uniform     sum_k p_k / K
    logit-mean  the softmax of the mean of the logits

A posterior whose loss is measured must not see the token it predicts. One that makes targets for a student
may look at the whole row: with `hindsight`, w_k is in proportion to prior_k p_k(the whole row)^temper. On
rows drawn from the mixture both teach the same on average, because the posterior given a beginning is the
mean, over all ways to go on, of the posterior given the whole. They differ where rows are not drawn from it:
on an answer of one token, say, the posterior of its beginning is the prior, and only hindsight gives weight
to the client that knows the answer.

Tensor suffixes: K teacher, P flat adapter, N predicted token, T predicted token of one row, D feature,
V vocabulary, k kept token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.distillation.targets import Targets
from fedllm.engine.engine import Engine
from fedllm.engine.head import CHUNK, GPU_CHUNK
from fedllm.engine.passes import MAX_ADAPTERS, packed
from fedllm.errors import ConfigError, LayoutError, NoDataError, NonFiniteError
from fedllm.models.chat import Encoded

KINDS = ("posterior", "uniform", "logit-mean")
STATE_BYTES = 128 * 2**20  # of all teachers' hidden states that are kept at a time
ADAPTER_BYTES = 512 * 2**20  # of the adapters on the model at a time, where nobody says how many


# --- mixing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mixing:
    """How teachers are mixed; see the module for the kinds.

    A `floor` above 0 deals that share of all weight evenly, so that no teacher is ever out: w becomes
    (1 - floor) w + floor / K. With `hindsight` the weights of a posterior look at whole rows.
    """

    kind: str
    log_priors_K: torch.Tensor  # float64; -inf leaves a teacher out
    temper: float = 1.0
    floor: float = 0.0
    hindsight: bool = False

    def without(self, dead_K: torch.Tensor) -> "Mixing":
        """Return the same with teachers left out."""
        priors_K = self.log_priors_K.masked_fill(dead_K, -torch.inf)
        return replace(self, log_priors_K=priors_K)

    def weights(self, log_probs_TK: torch.Tensor, evidence_K: torch.Tensor) -> torch.Tensor:
        """Return the weights [T, K] in float64 for the next T tokens of a row.

        `log_probs_TK` is what each teacher gave these tokens, `evidence_K` the sum over those before them, or
        over the whole row with hindsight.
        """
        present_K = self.log_priors_K.isfinite().double()
        if self.kind != "posterior":
            return (present_K / present_K.sum()).expand(len(log_probs_TK), -1)
        log_priors_K, log_probs_TK = self.log_priors_K.double(), log_probs_TK.double()
        before_TK = log_probs_TK.cumsum(dim=0).roll(1, dims=0)  # no weight sees the token it helps to predict
        before_TK[:1] = 0.0
        seen_TK = evidence_K.expand_as(before_TK) if self.hindsight else before_TK + evidence_K
        scores_TK = log_priors_K.expand_as(seen_TK)
        if self.temper:  # 0 * -inf is no number
            scores_TK = scores_TK + self.temper * seen_TK
        # A text that is impossible to every teacher tells them apart no longer: the priors decide.
        impossible_T1 = scores_TK.isneginf().all(dim=1, keepdim=True)
        weights_TK = torch.where(impossible_T1, log_priors_K, scores_TK).softmax(dim=1)
        if self.floor:
            weights_TK = (1 - self.floor) * weights_TK + self.floor * present_K / present_K.sum()
        return weights_TK


@dataclass(frozen=True, eq=False)
class Prediction:
    """What an ensemble predicts for T tokens of a row."""

    probs_TV: torch.Tensor
    log_probs_T: torch.Tensor  # of the tokens that follow
    weights_TK: torch.Tensor  # float64
    evidence_K: torch.Tensor  # float64, for the next tokens of the row: see `Mixing.weights`


def said(logits_KTV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [T, K] of the tokens; the logits become log-probabilities."""
    index_KT1 = tokens_T.expand(len(logits_KTV), -1)[:, :, None]
    logits_KTV.sub_(logits_KTV.logsumexp(dim=2, keepdim=True))  # without a second copy
    return logits_KTV.gather(2, index_KT1)[:, :, 0].T.double()


def mix(
    logits_KTV: torch.Tensor, tokens_T: torch.Tensor, mixing: Mixing, evidence_K: torch.Tensor
) -> Prediction:
    """Return what the ensemble predicts for the next T tokens of a row; the logits are overwritten.

    Logits must be finite, also those of teachers that are left out.
    """
    said_TK = said(logits_KTV, tokens_T)
    weights_TK = mixing.weights(said_TK, evidence_K)
    shares_TK = weights_TK.to(logits_KTV.dtype)
    if mixing.kind == "logit-mean":
        # The constant between a logit and a log-probability cancels in the softmax.
        log_probs_TV = torch.einsum("tk,ktv->tv", shares_TK, logits_KTV).log_softmax(dim=1)
        probs_TV, log_probs_T = log_probs_TV.exp(), log_probs_TV.gather(1, tokens_T[:, None])[:, 0]
    else:
        probs_TV = torch.einsum("tk,ktv->tv", shares_TK, logits_KTV.exp_())
        log_probs_T = (said_TK + weights_TK.log()).logsumexp(dim=1)  # float64, whatever the model's dtype
    if not mixing.hindsight:
        evidence_K = evidence_K + said_TK.sum(dim=0)
    return Prediction(probs_TV, log_probs_T, weights_TK, evidence_K)


# --- teaching ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Teacher:
    """K adapters [P] of one layout and how they are mixed; see the module for the kinds.

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
    hindsight: bool = False,
    teachers_at_once: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Targets:
    """Return what the teacher predicts for every learnt token of `rows`, its `top_k` likeliest tokens each.

    A token with label -100 is context: it is not predicted, nor does it tell whose text this is. `hindsight`
    is for targets to learn, never for a loss to compare with a model's: see the module. At most
    `teachers_at_once` adapters are on the model at a time (0 = as many as fit in 512 MiB), fewer where the
    GPU runs out of memory; that changes rounding and speed, nothing else. An adapter that is not finite, or
    that gives numbers that are not, has no weight there and is named in `Targets.silenced`. `dtype` is what
    log-probabilities are kept in; float64 keeps everything, for exactness tests.

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
    base_dtype = engine.base.dtype
    sound = [n for n, vector in enumerate(teacher.adapters) if bool(vector.to(base_dtype).isfinite().all())]
    if not sound:
        raise NonFiniteError("distillation: no client's adapter is finite, so there is nobody to learn from")
    at_once = teachers_at_once or max(1, min(MAX_ADAPTERS, ADAPTER_BYTES // (4 * teacher.layout.size)))
    ensemble = _Ensemble(engine, teacher, sound, at_once, hindsight)
    kept: list[tuple[torch.Tensor, ...]] = []
    silenced = set(range(len(teacher.adapters))) - set(sound)
    for block in packed(taught, [ensemble.state_bytes(row) for row in taught], STATE_BYTES):
        asked = ensemble.ask(block)
        silenced |= {sound[place] for dead_K in _dead(asked) for place in dead_K}
        predictions = (one for row in asked for one in ensemble.predict(row))
        parts = [_kept(one, top_k, dtype) for one in predictions]
        # Copied from a GPU once a block: every copy waits for all that was asked of it.
        kept.append(tuple(torch.cat(each).cpu() for each in zip(*parts, strict=True)))
    ids_Nk, log_probs_Nk, tail_N, entropy_N, weights_NS, said_N = map(torch.cat, zip(*kept, strict=True))
    weights_NK = weights_NS.new_zeros(len(weights_NS), len(teacher.adapters))
    weights_NK[:, sound] = weights_NS  # the others were never asked
    loss, silent = -float(said_N.mean()), tuple(sorted(silenced))
    return Targets(taught, ids_Nk, log_probs_Nk, tail_N, entropy_N, weights_NK, loss, silent)


@dataclass(frozen=True, eq=False)
class _Row:
    """What all adapters have computed of a row, on the device of the model."""

    tokens_T: torch.Tensor
    states_KTD: torch.Tensor
    dead_K: torch.Tensor  # whose states are not all finite


def _dead(rows: Sequence[_Row]) -> list[list[int]]:
    """Return for each row the places of the adapters that are dead there.

    Raises:
        NonFiniteError: all of them are.
    """
    dead_RK = torch.stack([row.dead_K for row in rows]).tolist()
    if any(map(all, dead_RK)):
        raise NonFiniteError("distillation: no client's adapter gives finite numbers on a row of the text")
    return [[place for place, is_dead in enumerate(dead_K) if is_dead] for dead_K in dead_RK]


@dataclass(frozen=True, eq=False)
class _Ensemble:
    """The finite adapters of a teacher, by their places in `sound`, on an engine."""

    engine: Engine
    teacher: Teacher
    sound: Sequence[int]
    at_once: int
    hindsight: bool

    @cached_property
    def mixing(self) -> Mixing:
        """How they are mixed, on the device of the model."""
        log_priors_K = self.teacher.priors.double()[list(self.sound)].log().to(self.engine.base.device)
        teacher = self.teacher
        hindsight = self.hindsight and teacher.kind == "posterior"  # other weights look at no token
        return Mixing(teacher.kind, log_priors_K, teacher.temper, teacher.floor, hindsight)

    def state_bytes(self, row: Encoded) -> int:
        """Return the bytes of all adapters' states for a row."""
        weight_VD = self.engine.passes.head.weight_VD
        text_config = self.engine.base.model.config.get_text_config()
        # Where the head is no plain matrix the states are the logits themselves.
        width = text_config.vocab_size if weight_VD is None else weight_VD.shape[1]
        return len(self.sound) * row.num_supervised * width * self.engine.base.dtype.itemsize

    def ask(self, rows: Sequence[Encoded]) -> list[_Row]:
        """Return what every adapter computes of the rows."""
        adapters = [self.teacher.adapters[place] for place in self.sound]
        states_KND = _in_groups(
            lambda group: self.engine.read(self.teacher.layout, group, rows),
            adapters,
            min(self.at_once, len(adapters)),
        )
        lengths = [row.num_supervised for row in rows]
        learnt = [token for row in rows for token in row.learnt_tokens]
        tokens_N = torch.tensor(learnt, device=states_KND.device)
        dead_KN = ~states_KND.isfinite().all(dim=2)
        by_row = zip(
            torch.split(tokens_N, lengths),
            torch.split(states_KND, lengths, dim=1),
            torch.split(dead_KN, lengths, dim=1),
            strict=True,
        )
        return [_Row(tokens_T, states_KTD, dead_KT.any(dim=1)) for tokens_T, states_KTD, dead_KT in by_row]

    def predict(self, row: _Row) -> Iterator[Prediction]:
        """Yield the predictions for a row's tokens, a few at a time: [CHUNK, V] logits in all."""
        # Weight 0 times NaN would be NaN.
        states_KTD = row.states_KTD.masked_fill(row.dead_K[:, None, None], 0.0)
        mixing = self.mixing.without(row.dead_K)
        evidence_K = torch.zeros(len(self.sound), dtype=torch.float64, device=states_KTD.device)
        if mixing.hindsight:  # the head is computed twice: logits of a whole row take too much memory
            for logits_KTV, tokens_T in self._logits(states_KTD, row.tokens_T):
                evidence_K = evidence_K + said(logits_KTV, tokens_T).sum(dim=0)
        for logits_KTV, tokens_T in self._logits(states_KTD, row.tokens_T):
            prediction = mix(logits_KTV, tokens_T, mixing, evidence_K)
            evidence_K = prediction.evidence_K
            yield prediction

    def _logits(
        self, states_KTD: torch.Tensor, tokens_T: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield all teachers' logits for a row's tokens, and the tokens, a few at a time."""
        chunk = GPU_CHUNK if states_KTD.device.type == "cuda" else CHUNK
        step = max(1, chunk // len(self.sound))
        for begin in range(0, len(tokens_T), step):
            part = slice(begin, begin + step)
            yield self.engine.passes.head.logits(states_KTD[:, part]), tokens_T[part]


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
    torch.cuda.empty_cache()  # outside the except block, whose traceback holds on to the tensors
    return _in_groups(read, adapters, at_once // 2)


def _kept(prediction: Prediction, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return the tensors of `Targets` for a few tokens, and the tokens' own log-probabilities.

    The prediction is overwritten.
    """
    probs_TV = prediction.probs_TV
    other = torch.float64 if dtype == torch.float64 else torch.float32  # exactness tests keep it all
    entropy_T = torch.special.entr(probs_TV).sum(dim=1)
    kept_Tk, ids_Tk = probs_TV.topk(min(top_k, probs_TV.shape[1]), dim=1)
    tail_T = probs_TV.scatter_(1, ids_Tk, 0.0).sum(dim=1)  # 1 minus the kept ones can be below 0
    log_probs_Tk = kept_Tk.clamp(min=torch.finfo(kept_Tk.dtype).tiny).log()  # finite, whatever underflows
    return (
        ids_Tk.int(),
        log_probs_Tk.to(dtype),
        tail_T.to(other),
        entropy_T.to(other),
        prediction.weights_TK.to(other),
        prediction.log_probs_T.double(),
    )
