"""Whether a distilled adapter takes the aggregate's place: only where the loss it is judged by says so."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedllm.runs.checkpoint import ServerState
from fedllm.types import DistilRecord
from strategies.evaluation import HeldOut, evaluate
from strategies.session import Session


@dataclass(frozen=True)
class Asked:
    """What clients say of the adapter that was kept: the step's record, and their losses under it."""

    state: ServerState
    record: DistilRecord
    held_out: HeldOut


def judged(
    before: float,
    after: float,
    text: str,
    *,
    error: float = 0.0,
    teacher: float | None = None,
    own: tuple[float, float] | None = None,
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
    if own is not None and not own[1] <= own[0]:
        rise = f"from {own[0]:.4f} to {own[1]:.4f}"
        return False, f"the loss on texts that the clients' adapters write would rise {rise}"
    return True, f"the held-out {text} loss improved"


def ask_clients(
    session: Session, aggregate: ServerState, distilled: ServerState, record: DistilRecord
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
    old, new = (_mean({client: held.shared[client] for client in both}) for held in (before, after))
    record = replace(record, clients_before=old, clients_after=new)
    if new > old:
        reason = f"the clients' own held-out loss would rise from {old:.4f} to {new:.4f}"
        return Asked(aggregate, replace(record, kept=False, reason=reason), before)
    return Asked(distilled, replace(record, reason=f"{record.reason}, the clients' own is not worse"), after)


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)
