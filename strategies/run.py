"""A run from its folder to its published adapter."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.engine.resident import Resident
from fedllm.errors import BudgetSpentError, CheckpointError, ConfigError, FedLLMError
from fedllm.models.base import describe_layout
from fedllm.models.files import resolve_model
from fedllm.plan.dealt_numbers import named_clients
from fedllm.plan.run_plan import RunPlan, resolve
from fedllm.runs.checkpoint import ServerState, load_checkpoint, save_checkpoint
from fedllm.runs.folder import describe_run, open_run_folder, write_result, write_rounds
from fedllm.runs.privacy_statement import summary_line
from fedllm.runs.records import RoundRecord
from fedllm.runs.spread import described
from strategies.aggregation.stock import check_stock
from strategies.distillation.ending import undo_distillation
from strategies.distillation.public_text import open_public_text
from strategies.exchange.evaluation import evaluate
from strategies.exchange.joining import join_clients
from strategies.grid.transport import Transport
from strategies.privacy import open_privacy, with_journal
from strategies.publish import measured_ends, publish_adapter, publish_privacy
from strategies.rounds import check_failure_rate, next_round
from strategies.session import SILENT, Session, Watch


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

    `start` replaces the seeded initial adapter, `stock` our own mean of the clients. `resident` holds the
    base model of this process, where its clients run here too. Whatever happens, complete rounds stay on disk
    and `result.json` says how the run ended.

    Raises:
        FedLLMError: the run cannot start or go on; the message says why.
    """
    plan = resolve(config)
    folder = open_run_folder(config)
    try:
        session = open_session(plan, grid, watch, stock, folder=folder, resident=resident)
        state = _first_state(session, folder, start)
        describe_run(folder, config)
        state, stopped = _rounds(session, state, folder)
        files = resolve_model(config.model.name)
        adapter = publish_adapter(folder, plan, files, state)
        ended = {"stopped": stopped} if stopped else {}
        write_result(folder, {**summary(state, adapter), **ended, **publish_privacy(folder, plan, state)})
    except FedLLMError as error:
        _write_failure(folder, str(error))
        raise
    except OSError as error:
        _write_failure(folder, "the run folder could not be written")
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror}; free space and use --resume"
        ) from None
    return state


def open_session(
    plan: RunPlan,
    grid: Grid,
    watch: Watch = SILENT,
    stock: Strategy | None = None,
    *,
    folder: Path | None = None,
    resident: Resident | None = None,
) -> Session:
    """Return a session over the clients that join on `grid`; `resident` is as in `run_federation`.

    `folder` is the run's: it holds the noise secret and the ledger of a private run, which otherwise live as
    long as the session, and the verdicts on synthetic text.

    Raises:
        ModelError, RunFailedError: the base model is absent, or too few clients join.
        ConfigError: `stock` is given and the run's rule is no plain mean of factors, or the run distils
            or its server is to add noise.
        DataError: the run distils, and its public text cannot be used.
        CheckpointError, MissingExtraError: the noise secret cannot be kept, or a library is missing.
    """
    config = plan.config
    privacy = open_privacy(plan.privacy, folder / "private" / "server" if folder else None)
    if privacy is not None:
        watch.notice(f"privacy: {summary_line(privacy.plan)}")
    if stock is not None:
        check_stock(plan.aggregation, distils=plan.distillation is not None)
        if privacy is not None and privacy.plan.is_central:
            raise ConfigError("a stock Flower strategy adds no noise; use privacy.trust = local without it")
    public_text = open_public_text(plan.distillation, config.data)
    layout = describe_layout(config.model, config.lora)
    transport = Transport(grid, keeps_late=config.federation.max_staleness > 0)
    clients = join_clients(transport, config, layout, watch.notice)
    watch.joined(clients)
    for name in set(named_clients(config.lora.client_ranks, config.lora.rank)) - clients.keys():
        watch.notice(f"lora.client-ranks names client {name}, which has not joined")
    return Session(
        plan,
        layout,
        transport,
        clients,
        watch,
        resident=resident or Resident(),
        stock=stock,
        privacy=privacy,
        folder=folder,
        public_text=public_text,
    )


def first_state(session: Session, start: AdapterState | None = None) -> ServerState:
    """Return the state before round 1, with the held-out loss of the base model as record 0."""
    state = ServerState(0, start or session.initial)
    held_out = evaluate(session, state)
    record = RoundRecord(
        round_num=0,
        held_out=held_out.shared,
        personal_held_out=held_out.personal,
        adapter=state.adapter.digest,
    )
    session.watch.record(record)
    return replace(state, records=(record,))


def summary(state: ServerState, adapter: Path) -> dict[str, object]:
    """Return the content of `result.json`: held-out losses before and after, and the adapter.

    The losses are those of the clients that were measured both times; else there are none.
    Under "personal" are the losses with every client's personal adapter on top, where there are any.
    """
    return {
        "status": "completed",
        "rounds": state.round_num,
        "adapter": str(adapter),
        "digest": state.adapter.digest,
        "held_out": {
            name: {
                **described(record.held_out),
                **({"personal": described(record.personal_held_out)} if record.personal_held_out else {}),
            }
            for name, record in measured_ends(state).items()
        },
    }


def _write_failure(folder: Path, reason: str) -> None:
    with suppress(OSError):  # a full disk may be the very reason
        write_result(folder, {"status": "failed", "reason": reason})


def _first_state(session: Session, folder: Path, start: AdapterState | None) -> ServerState:
    if not session.config.run.resume:
        return with_journal(session.privacy, first_state(session, start))
    state, passed_over = load_checkpoint(folder / "checkpoints", session.config, session.layout)
    for line in passed_over:
        session.watch.notice(line)
    session.watch.notice(f"resuming after round {state.round_num}")
    return with_journal(session.privacy, state)


def _rounds(session: Session, state: ServerState, folder: Path) -> tuple[ServerState, str]:
    """Do the rounds that are left; save after each, and once more, however they end, if the last save failed.

    Returns (the last state, why it is not that of the last round: a spent privacy budget, or "").
    """
    is_saved, stopped = True, ""
    try:
        while state.round_num < session.config.federation.num_rounds:
            # Where the round does not come about, the run ends with the adapter that was distilled.
            state, _ = next_round(session, undo_distillation(state))
            is_saved = _is_saved(session, state, folder)
            check_failure_rate(state, session.config.federation.max_failure_rate)
    except BudgetSpentError as error:
        stopped = f"{error}{_not_distilled(session.config)}"
        session.watch.notice(stopped)
        state = with_journal(session.privacy, state)  # with what an attempt has cost
        state, is_saved = _measured(session, state), False
    except FedLLMError:
        if not is_saved:
            with suppress(CheckpointError):  # why the run ends is the error that is under way
                _save(session, state, folder)
        raise
    if not is_saved:
        _save(session, state, folder)
    return state, stopped


def _is_saved(session: Session, state: ServerState, folder: Path) -> bool:
    """Save a state; where that fails, say so and return False: the next round saves again."""
    try:
        _save(session, state, folder)
    except CheckpointError as error:
        session.watch.notice(f"{error}; going on, the next round saves again")
        return False
    return True


def _not_distilled(config: RunConfig) -> str:
    """Return what a run that ends before its last round leaves undone, "" where nothing was planned."""
    if config.distill.when != "last":
        return ""
    return f"; the distillation step planned after round {config.federation.num_rounds} is not done"


def _measured(session: Session, state: ServerState) -> ServerState:
    """Return the state with the held-out losses of a run that has ended before its last round."""
    if not state.records or state.records[-1].held_out:
        return state
    held_out = evaluate(session, state)
    last = replace(state.records[-1], held_out=held_out.shared, personal_held_out=held_out.personal)
    return replace(state, records=(*state.records[:-1], last))


def _save(session: Session, state: ServerState, folder: Path) -> None:
    save_checkpoint(folder / "checkpoints", state, session.config)
    try:
        write_rounds(folder, state.records)
    except OSError as error:
        raise CheckpointError(f"{folder / 'rounds.jsonl'}: {error.strerror}") from None
