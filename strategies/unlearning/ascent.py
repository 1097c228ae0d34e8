"""Unlearning by ascent: a finished adapter trained away from a client's rows, and held to the base (class D).

For every token of those rows the training lowers

    max(0, log p(token) - log p_base(token)) + KL(p_base | p)

The first term is gradient ascent on the loss (arXiv 2207.05521), but only as far as the base model: beyond
it ascent has no end, and a row that is too unlikely gives itself away too. The second keeps what the adapter
says besides that token. Training ends where the client's rows are no better known than rows that it held out.
They differ in nothing but having been trained on, so what others have taught of that kind of text may stay.
Tensor suffixes: N learnt token of all rows, n those of a chunk, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.attacks.token_scores import no_adapter, score
from fedllm.distillation.student import StudentTraining, student_batches
from fedllm.distillation.targets import BucketDivergence, Targets
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob, Job
from fedllm.models.chat import Encoded

TOP_K = 64  # likeliest tokens of the base model that are kept one by one
MOST_STOPS = 16  # lengths of training that are tried


@dataclass(frozen=True, eq=False)
class AwayFromTokens:
    """The loss of a few tokens: how much likelier than under the base model each is, and the divergence."""

    pull: BucketDivergence
    tokens_N: torch.Tensor
    base_N: torch.Tensor  # the base model's log-probabilities of these tokens

    def __call__(
        self, part: slice, logits_NV: torch.Tensor, wants_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses and gradients; see `fedllm.engine.head.Criterion`."""
        tokens_n1 = self.tokens_N[part, None]
        log_probs_nV = logits_NV.log_softmax(dim=1)
        lead_n = log_probs_nV.gather(1, tokens_n1)[:, 0] - self.base_N[part].to(logits_NV.dtype)
        losses_n, grad_nV = self.pull(part, logits_NV, wants_grad)  # overwrites the logits
        losses_n = losses_n + lead_n.clamp(min=0)
        if grad_nV is None:
            return losses_n, None
        # d log p(token) / d logits = onehot(token) - p, for tokens that are still ahead of the base.
        ahead_n1 = (lead_n > 0).to(logits_NV.dtype)[:, None]
        grad_nV.addcmul_(log_probs_nV.exp_(), ahead_n1, value=-1)
        return losses_n, grad_nV.scatter_add_(1, tokens_n1, ahead_n1)


@dataclass(frozen=True, eq=False)
class AwayFrom:
    """The objective of a training job: away from `targets.rows`, towards what the base model says of them."""

    targets: Targets
    base_N: torch.Tensor

    def criterion(self, rows: Sequence[Encoded], device: torch.device) -> AwayFromTokens:
        """Return the loss of the learnt tokens of `rows`, which must be rows of the targets."""
        starts, places = self.targets.starts, [self.targets.places[row] for row in rows]
        base_N = torch.cat([self.base_N[starts[place] : starts[place + 1]] for place in places])
        tokens_N = torch.tensor([token for row in rows for token in row.learnt_tokens], device=device)
        return AwayFromTokens(self.targets.criterion(rows, device), tokens_N, base_N.to(device))


def away_from(engine: Engine, rows: Sequence[Encoded]) -> AwayFrom:
    """Return the objective that leads away from `rows`.

    Raises:
        NoDataError: no row has a token to learn.
    """
    nothing_P, layout = no_adapter(engine), engine.layout
    base = Teacher((nothing_P,), layout, torch.ones(1), kind="uniform")
    targets = teach(engine, base, rows, top_k=TOP_K)
    (scores,) = score(engine, [nothing_P], targets.rows)
    return AwayFrom(targets, torch.cat([one.log_probs for one in scores]))


def ascend(
    engine: Engine,
    start: AdapterState,
    objective: AwayFrom,
    held_out: Sequence[Encoded],
    training: StudentTraining,
) -> AdapterState:
    """Return `start` trained by `objective` for `training.steps` at most, on batches of its rows.

    Without `held_out` rows it ends where the rows are as unlikely as under the base model.

    Raises:
        NonFiniteError: training diverged.
    """
    rows = objective.targets.rows
    stops = tuple(sorted({max(1, training.steps * n // MOST_STOPS) for n in range(1, MOST_STOPS + 1)}))
    batches = student_batches(rows, training)
    job = Job(
        "unlearning",
        start.vector,
        batches,
        training.local,
        layout=start.layout,
        objective=objective,
        snapshots=stops,
    )
    (result,) = engine.train([job])
    tried = [
        AdapterState(start.layout, (start.vector + result.snapshots[steps]).float()).checked_finite()
        for steps in stops
    ]
    known = _lead_over_base(engine, [one.vector for one in tried], rows)
    expected = (
        _lead_over_base(engine, [one.vector for one in tried], held_out) if held_out else [0.0] * len(known)
    )
    pairs = zip(tried, known, expected, strict=True)
    return next((one for one, found, usual in pairs if found <= usual), tried[-1])


def _lead_over_base(engine: Engine, adapters: Sequence[torch.Tensor], rows: Sequence[Encoded]) -> list[float]:
    """Return how much better each adapter [P] knows the rows than the base model, in nats per token."""
    jobs = [EvaluationJob("", vector_P, tuple(rows)) for vector_P in (no_adapter(engine), *adapters)]
    base, *found = [evaluation.loss for evaluation in engine.evaluate(jobs)]
    return [base - loss for loss in found]
