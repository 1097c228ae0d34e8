"""How a run starts: the session over the clients that join, and the state its first round begins with."""

from pathlib import Path

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm.adapters.layout import AdapterState
from fedllm.engine.resident import Resident
from fedllm.models.base import describe_layout
from fedllm.plan.run_plan import RunPlan, fixed_keys
from fedllm.runs.checkpoint import ServerState, load_checkpoint, newest_round
from fedllm.runs.folder import CHECKPOINTS, read_left_out
from fedllm.runs.privacy_statement import summary_line
from strategies.aggregation.stock import check_stock
from strategies.distillation.public_text import open_public_text
from strategies.exchange.joining import join_clients
from strategies.first_state import first_state, start_adapter
from strategies.grid.transport import Transport
from strategies.memory import Room
from strategies.privacy import open_privacy, with_journal
from strategies.session import SILENT, Session, Watch


def open_session(
    plan: RunPlan,
    grid: Grid,
    watch: Watch = SILENT,
    stock: Strategy | None = None,
    *,
    folder: Path | None = None,
    resident: Resident | None = None,
) -> Session:
    """Return a session over the clients that join on `grid`.

    `folder` is the run's: it holds the noise secret and the ledger of a private run, which otherwise live as
    long as the session, and the verdicts on synthetic text. `resident` and `stock` are as in
    `strategies.run.run_federation`.

    Raises:
        ModelError, RunFailedError: the base model is absent, or too few clients join.
        ConfigError: `stock` is given and the run's rule is no plain mean of factors, or the run distils
            or its server is to add noise; or federation.sites names no list of sites.
        DataError: the run distils, and its public text cannot be used.
        CheckpointError, MissingExtraError: the noise secret cannot be kept, or a library is missing.
    """
    config = plan.config
    # All that can fail for this machine comes before the wait for clients.
    privacy = open_privacy(plan.privacy, folder / "private" / "server" if folder else None)
    if privacy is not None:
        watch.notice(f"privacy: {summary_line(privacy.plan)}")
    if stock is not None:
        check_stock(plan)
    public_text = open_public_text(plan.distillation, config.data)
    layout = describe_layout(config.model, config.lora, watch.notice)
    resident = resident or Resident()
    if warning := resident.check_tokenizer(config.model, config.train.max_length):
        watch.notice(warning)
    # Late replies are kept only where a round may use them, else they are counted and dropped.
    transport = Transport(grid, heard=watch.reply, keeps_late=config.federation.max_staleness > 0)
    left_out = read_left_out(folder) if folder else frozenset()
    clients = join_clients(transport, plan, layout, watch.notice, watch.phase, left_out)
    watch.joined(clients)
    for name in plan.clients_with_own_rank() - clients.keys():
        watch.notice(f"lora.client-ranks names client {name}, which has not joined")
    return Session(
        plan,
        layout,
        transport,
        clients,
        watch,
        resident=resident,
        stock=stock,
        privacy=privacy,
        folder=folder,
        room=Room(folder=folder),
        public_text=public_text,
    )


def begin_or_resume(session: Session, folder: Path, start: AdapterState | None) -> ServerState:
    """Return the state to go on from: that of the newest checkpoint, or before round 1 where there is none.

    `open_run_folder` has refused a run that has checkpoints and is not to be resumed.

    Raises:
        CheckpointError, ConfigError: no checkpoint is intact, or it is of another run.
        IntegrityError, ConfigError: the adapter to start from is damaged, or not one that this run can train.
    """
    if not newest_round(folder / CHECKPOINTS):
        if session.config.run.resume:
            session.watch.notice("no complete round to resume after: starting")
        return with_journal(session.privacy, first_state(session, start or start_adapter(session, folder)))
    # A run killed after a release and before its checkpoint finds the charge in the ledger's own file.
    state, passed_over = load_checkpoint(folder / CHECKPOINTS, fixed_keys(session.config), session.layout)
    for line in passed_over:
        session.watch.notice(line)
    session.watch.notice(f"resuming after round {state.round_num}")
    return with_journal(session.privacy, state)
