"""Whether a distilled adapter takes the aggregate's place: only where the loss it is judged by says so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.models.chat import Encoded
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import DistillationRecord, LossChange
from strategies.distillation.public_text import by_domain
from strategies.exchange.evaluation import HeldOut, evaluate
from strategies.session import Session


@dataclass(frozen=True)
class Loss:
    """A mean loss in nats per token, over all tokens and over those of each domain.

    `texts` are the sum of the losses and the number of tokens of every text, in order.
    """

    mean: float
    domains: Mapping[str, float]
    texts: tuple[tuple[float, int], ...] = ()


def loss_of(engine: Engine, adapter: AdapterState, rows: Sequence[Encoded], domains: Sequence[str]) -> Loss:
    """Return the loss of an adapter on rows that each count in a domain."""
    jobs = [EvaluationJob(domain, adapter.vector, (row,)) for domain, row in zip(domains, rows, strict=True)]
    texts = tuple((each.loss * each.num_tokens, each.num_tokens) for each in engine.evaluate(jobs))
    means = {name: _mean(found) for name, found in by_domain(domains, texts).items()}
    return Loss(_mean(texts), means, texts)


def _mean(texts: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in texts) / sum(number for _, number in texts)


def error_of_gain(before: Loss, after: Loss) -> float:
    """Return the standard error of the change of a mean loss over the same texts, in nats per token.

    That of a ratio of sums over texts (Cochran 1977, section 2.11). One text alone has none: 0.
    """
    number = len(before.texts)
    if number < 2:
        return 0.0
    pairs = zip(before.texts, after.texts, strict=True)
    changes = [(new - old, num_tokens) for (old, num_tokens), (new, _) in pairs]
    mean = _mean(changes)
    rest = sum((change - mean * num_tokens) ** 2 for change, num_tokens in changes)
    return math.sqrt(rest * number / (number - 1)) / sum(num_tokens for _, num_tokens in changes)


def weights_by_domain(
    weights_NK: torch.Tensor,
    clients: Sequence[str],
    rows: Sequence[Encoded],
    domains: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Return the mean weight of every teacher over the predicted tokens of each domain's rows."""
    by_row = torch.split(weights_NK.double(), [row.num_supervised for row in rows])
    return {
        domain: dict(zip(clients, torch.cat(found).mean(dim=0).tolist(), strict=True))
        for domain, found in by_domain(domains, by_row).items()
    }


@dataclass(frozen=True)
class Asked:
    """What clients say of the adapter that was kept: the step's record, and their losses under it."""

    state: ServerState
    record: DistillationRecord
    held_out: HeldOut


def judged(
    before: float,
    after: float,
    text: str,
    *,
    error: float = 0.0,
    teacher: float | None = None,
    own: LossChange | None = None,
) -> tuple[bool, str]:
    """Return whether a loss on held-out text of a kind has improved, and that in words.

    `error` is the standard error of the change: a gain within it may be the choice of texts. `teacher` is the
    teacher's own loss there: one that knows the text no better than its student has nothing to teach,
    whatever the student made of it. `own` is the loss before and after on texts that the clients' adapters
    write, which must not rise: public text may lie where no client is.
    """
    if not math.isfinite(after):
        return False, "the student diverged; lower distill.learning-rate"
    if teacher is not None and not teacher < before:
        return False, f"the teacher knows the held-out {text} text no better than the aggregate"
    if after >= before:
        return False, f"the held-out {text} loss did not improve"
    if not before - after > error:
        return False, f"the held-out {text} loss improved by no more than its standard error, {error:.4f}"
    if own is not None and not own.after <= own.before:
        rise = f"from {own.before:.4f} to {own.after:.4f}"
        return False, f"the loss on texts that the clients' adapters write would rise {rise}"
    return True, f"the held-out {text} loss improved"


def ask_clients(
    session: Session, aggregate: ServerState, distilled: ServerState, record: DistillationRecord
) -> Asked:
    """Let clients measure both adapters on rows they keep back; keep the distilled one if it is not worse.

    The mean is over clients that answer for both. Where none does, nothing speaks for the distilled adapter
    and the aggregate stays.
    """
    before, after = evaluate(session, aggregate), evaluate(session, distilled)
    both = sorted(before.shared.keys() & after.shared.keys())
    if not both:
        reason = "no client measured both adapters"
        return Asked(aggregate, replace(record, kept=False, reason=reason), before)
    old, new = (sum(held.shared[client] for client in both) / len(both) for held in (before, after))
    if record.losses is not None:
        record = replace(record, losses=replace(record.losses, clients=LossChange(old, new)))
    if new > old:
        reason = f"the clients' own held-out loss would rise from {old:.4f} to {new:.4f}"
        return Asked(aggregate, replace(record, kept=False, reason=reason), before)
    return Asked(distilled, replace(record, reason=f"{record.reason}, the clients' own is not worse"), after)
