"""Whether a distilled adapter takes the aggregate's place: only where held-out losses say it is better."""

import math
from dataclasses import replace

from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import DistillationLosses, DistillationRecord, LossChange
from strategies.exchange.evaluation import HeldOut, evaluate
from strategies.session import Session

# Nats per token by which the teacher must know held-out text better than the aggregate. Where clients had not
# moved that far apart no student gained: docs/results/distillation.md.
LEAST_AHEAD = 0.02


def judge_teacher(before: float, ensemble: float, kind: str) -> str:
    """Return why a teacher has nothing to teach, "" where it has.

    `before` is the aggregate's loss on held-out text of a kind, `ensemble` the teacher's. One that is not a
    number has nothing to teach.
    """
    if before - ensemble > LEAST_AHEAD:
        return ""
    return (
        f"there is nothing to teach: the clients' ensemble is at {ensemble:.3f} nats a token on the held-out"
        f" {kind} text, the aggregate at {before:.3f}, and no student gains from a lead of {LEAST_AHEAD:g} or"
        " less"
    )


def judge_losses(losses: DistillationLosses, kind: str, *, asks_clients: bool) -> tuple[bool, str]:
    """Return whether the losses on held-out text of a kind speak for the distilled adapter, and why.

    The gain must exceed its standard error: a smaller one may be the choice of texts. The teacher must have
    something to teach (`judge_teacher`). Public text may lie where no client is; where no client is asked,
    texts that the clients' adapters write stand in for their rows, and the loss on them must not rise.
    """
    before, after, own = losses.held_out.before, losses.held_out.after, losses.own
    if not math.isfinite(after):
        return False, "the student diverged; lower distill.learning-rate"
    if reason := judge_teacher(before, losses.ensemble, kind):
        return False, reason
    if after >= before:
        return False, f"the held-out {kind} loss did not improve"
    error = losses.error or 0.0
    if not before - after > error:
        return False, f"the held-out {kind} loss improved by no more than its standard error, {error:.4f}"
    if not asks_clients and own is not None and not own.after <= own.before:
        rise = f"from {own.before:.4f} to {own.after:.4f}"
        return False, f"the loss on texts that the clients' adapters write would rise {rise}"
    return True, f"the held-out {kind} loss improved"


def ask_clients(
    session: Session, aggregate: ServerState, distilled: ServerState, record: DistillationRecord
) -> tuple[ServerState, DistillationRecord, HeldOut]:
    """Let clients measure both adapters on rows they keep back; keep the distilled one if it is not worse.

    Returns the state that is kept, the record and the clients' losses under its adapter. The mean is over
    clients that answer for both. Where none does, nothing speaks for the distilled adapter.
    """
    before, after = evaluate(session, aggregate), evaluate(session, distilled)
    # Means over other clients would differ for that reason alone.
    both = sorted(before.shared.keys() & after.shared.keys())
    if not both:
        return aggregate, replace(record, kept=False, reason="no client measured both adapters"), before
    old, new = (sum(held.shared[client] for client in both) / len(both) for held in (before, after))
    if record.losses is not None:
        record = replace(record, losses=replace(record.losses, clients=LossChange(old, new)))
    if new > old:
        reason = f"the clients' own held-out loss would rise from {old:.4f} to {new:.4f}"
        return aggregate, replace(record, kept=False, reason=reason), before
    return distilled, replace(record, reason=f"{record.reason}, the clients' own is not worse"), after
