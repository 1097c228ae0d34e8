"""Whether a run's numbers are still finite, and what is said where they are not or got worse."""

from collections.abc import Mapping, Sequence
from itertools import chain

from fedllm.config.run_config import RunConfig
from fedllm.errors import DivergedError
from fedllm.plan.run_plan import fixed_keys
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundRecord
from fedllm.runs.spread import spread_of

# The most that a value of B A may be. Every normalisation squares what a layer gives, and the largest float32
# is 3.4e38, so an adapter above this gives NaN on any row.
LARGEST_PRODUCT = 1e18


def is_finite(record: RoundRecord) -> bool:
    """Return whether at most half of the clients that answered have no finite held-out loss.

    Not one client alone: it may lie, and its own rows may be at fault.
    """
    return len(record.not_finite) <= len(record.held_out)


def check_finite(
    config: RunConfig, state: ServerState, record: RoundRecord, *, is_saved: bool = False
) -> None:
    """Stop a run whose last round, `record`, led to `state` and gave no finite numbers.

    `is_saved` says that the round has a checkpoint already, since it was measured only afterwards.

    Raises:
        DivergedError: most clients' held-out losses are not finite, or the adapter's values are too large.
    """
    number, total = len(record.not_finite), len(record.not_finite) + len(record.held_out)
    if not is_finite(record) and record.round_num == 0:
        raise DivergedError(
            f"the base model itself has no finite loss on the held-out rows of {number} of {total} clients;"
            " check its weights, or set model.dtype = float32"
        )
    if not is_finite(record):
        what = f"the held-out loss of {number} of {total} clients is no finite number after it"
    elif not largest_product(state) <= LARGEST_PRODUCT:
        what = "the adapter's values are too large to compute with after it"
    else:
        return
    raise diverged(config, state.records, record.round_num, what, is_saved=is_saved)


def diverged(
    config: RunConfig, records: Sequence[RoundRecord], round_num: int, what: str, *, is_saved: bool = False
) -> DivergedError:
    """Return the error of a run that diverged in a round: what is kept, and how to go on."""
    saved = round_num - 1
    measured = [one.round_num for one in records if one.held_out and is_finite(one)]
    known = max((number for number in measured if number <= saved), default=None)
    kept = "no earlier round is saved" if saved == 0 else f"the checkpoint of round {saved} is kept"
    if saved and known != saved:
        kept += ", whose loss was not measured"
        kept += "" if known is None else f" (that of round {known} was finite)"
    if is_saved:
        kept = "its checkpoint is kept"
    elif saved and "federation.num-rounds" not in fixed_keys(config):
        kept += f": --resume federation.num-rounds={saved} publishes it"
    return DivergedError(
        f"round {round_num} diverged: {what}. Nothing of it is published; {kept}. Run again under another"
        f" run.name with a lower train.learning-rate (now {config.train.learning_rate:g})"
    )


def largest_product(state: ServerState) -> float:
    """Return a bound on the values that adapter and base delta add to the base model's weights."""
    layout = state.adapter.layout
    ours = ((b_OR, a_RI) for a_RI, b_OR in layout.factors(state.adapter.vector))
    bounds = [
        layout.scale * b.shape[-1] * float(b.abs().max()) * float(a.abs().max())
        for b, a in chain(ours, state.base_delta.factors)
        if b.numel() and a.numel()
    ]
    return max(bounds, default=0.0)


def warnings_of(ends: Mapping[str, RoundRecord], last: RoundRecord | None) -> list[str]:
    """Return what a person must know before using a finished run's adapter, a line each.

    `ends` are the records "before" and "after" with the losses of the same clients, if measured.
    """
    found = []
    if ends:
        before, after = (spread_of(ends[name].held_out).mean for name in ("before", "after"))
        if after > before:
            found.append(
                f"the mean held-out loss ended above the base model's ({before:.4f} before,"
                f" {after:.4f} after); lower train.learning-rate or do fewer steps"
            )
    if last is not None and last.not_finite:
        total = len(last.not_finite) + len(last.held_out)
        found.append(f"{len(last.not_finite)} of {total} clients report no finite held-out loss")
    return found
