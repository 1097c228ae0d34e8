"""A run from its folder to its published adapter."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.engine.resident import Resident
from fedllm.errors import BudgetSpentError, CheckpointError, DivergedError, FedLLMError, RunFailedError
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState, save_checkpoint
from fedllm.runs.folder import CHECKPOINTS, describe_run, open_run_folder, write_result, write_rounds
from strategies.distillation.ending import undo_distillation
from strategies.exchange.after_rounds import LAST_STEPS, evaluate_last
from strategies.listeners import heard
from strategies.privacy import with_journal
from strategies.publish import publish_run
from strategies.rounds import next_round
from strategies.session import SILENT, Session, Watch
from strategies.start import begin_or_resume, open_session

FAILING_ROUNDS = 3  # rounds in a row above federation.max-failure-rate before the run stops


def run_federation(
    config: RunConfig,
    grid: Grid,
    watch: Watch = SILENT,
    start: AdapterState | None = None,
    stock: Strategy | None = None,
    *,
    resident: Resident | None = None,
) -> ServerState:
    """Do every round of `config` over `grid`, publish the adapter and return the final state.

    `start`, else the adapter in the run's folder, replaces the seeded initial one, `stock` our own mean of
    the clients. `resident` holds the base model of this process, where its clients run here too. Whatever
    happens, complete rounds stay on disk and `result.json` says how the run ended.

    Raises:
        FedLLMError: the run cannot start or go on; the message says why.
    """
    plan = resolve(config)
    with (
        open_run_folder(config) as folder,
        _failure_noted(folder),
        heard(folder, plan, watch, _given(start, stock)) as watch,
    ):
        (folder / "result.json").unlink(missing_ok=True)  # it says how the latest attempt ended
        session = open_session(plan, grid, watch, stock, folder=folder, resident=resident)
        state = begin_or_resume(session, folder, start)
        describe_run(folder, config)  # only now is it certain that the run goes on with this configuration
        stopped = ""
        if not plan.only_measures:
            state, stopped = _rounds(session, state, folder)
            for step in LAST_STEPS:
                before, state = state, step(session, state)
                if state is not before:
                    _save(session, state, folder)  # before parties remove what they keep of the run
        for line in publish_run(folder, plan, state, stopped, session.clients, session.transport.bundle):
            watch.notice(f"warning: {line}")
        return state


def _given(start: AdapterState | None, stock: Strategy | None) -> list[str]:
    """Return what a caller gave to a run, in words."""
    adapter = [] if start is None else ["an adapter to start from"]
    return adapter + ([] if stock is None else [f"the strategy {type(stock).__name__}"])


@contextmanager
def _failure_noted(folder: Path) -> Iterator[None]:
    """Write why a run failed into its `result.json`."""
    try:
        yield
    except FedLLMError as error:
        _write_failure(folder, str(error), "diverged" if isinstance(error, DivergedError) else "failed")
        raise
    except OSError as error:
        _write_failure(folder, "the run folder could not be written")
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror}; free space and use --resume"
        ) from None


def _write_failure(folder: Path, reason: str, status: str = "failed") -> None:
    with suppress(OSError):  # a full disk may be the very reason
        write_result(folder, {"status": status, "reason": reason})


def _rounds(session: Session, state: ServerState, folder: Path) -> tuple[ServerState, str]:
    """Do the rounds that are left; save after each, and once more, however they end, if the last save failed.

    Returns (the last state, why it is not that of the last round: a spent privacy budget, or "").
    """
    is_saved, stopped, begun = True, "", state.round_num
    try:
        while state.round_num < session.config.federation.num_rounds:
            # Where the round does not come about, the run ends with the adapter that was distilled.
            state, _ = next_round(session, undo_distillation(state))
            is_saved = _is_saved(session, state, folder)
            check_failure_rate(state, session.config.federation.max_failure_rate)
        if state.round_num == begun:  # a run that ends here though it was to go on further
            state = evaluate_last(session, state)
    except BudgetSpentError as error:
        stopped = f"{error}{_not_distilled(session.config)}"
        session.watch.notice(stopped)
        state = with_journal(session.privacy, state)  # with what an attempt has cost
        state, is_saved = evaluate_last(session, state), False
    except FedLLMError:
        if not is_saved:
            with suppress(CheckpointError):  # why the run ends is the error that is under way
                _save(session, state, folder)
        raise
    if not is_saved:  # now a failure ends the run: no later round would save again
        _save(session, state, folder)
    return state, stopped


def check_failure_rate(state: ServerState, limit: float) -> None:
    """Stop a run whose clients keep failing; called once its last round is saved.

    Raises:
        RunFailedError: more than `limit` of the clients failed in each of the last three rounds.
    """
    recent = [r for r in state.records if r.round_num > 0][-FAILING_ROUNDS:]  # 0 is the base model
    rates = [len(record.lost) / len(record.asked) for record in recent if record.asked]
    if len(rates) == FAILING_ROUNDS and min(rates) > limit:
        reasons = sorted(set(recent[-1].lost.values()))  # the first stands for them all
        raise RunFailedError(
            f"more than {limit:.0%} of the clients failed in {FAILING_ROUNDS} rounds in a row"
            f" (last: {reasons[0]}); the adapter of round {state.round_num} is kept"
        )


def _not_distilled(config: RunConfig) -> str:
    """Return what a run that ends before its last round leaves undone, "" where nothing was planned."""
    if config.distill.when != "last":
        return ""
    return f"; the distillation step planned after round {config.federation.num_rounds} is not done"


def _is_saved(session: Session, state: ServerState, folder: Path) -> bool:
    """Save a state; where that fails, say so and return False: the next round saves again."""
    try:
        _save(session, state, folder)
    except CheckpointError as error:
        session.watch.notice(f"{error}; going on, the next round saves again")
        return False
    return True


def _save(session: Session, state: ServerState, folder: Path) -> None:
    save_checkpoint(folder / CHECKPOINTS, state, session.config.to_flat())
    session.watch.saved(state)
    try:
        write_rounds(folder, state.records)
    except OSError as error:
        raise CheckpointError(f"{folder / 'rounds.jsonl'}: {error.strerror}") from None
