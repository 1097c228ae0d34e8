"""The steps of a pipeline. Each takes the state to the next, and may be repeated after a kill.

    watch     look at the clients; an alarm, new rows or the calendar lead on, else the next look is awaited
    compare   after an alarm: is the version before better on the rows of today?
    rollback  then it comes back into use
    run       else, and after every other trigger: train on, from the version in use
    judge     the gates
    keep      a gate was not passed: what is in use stays
    add       the new adapter becomes a signed version of the registry
    promote   and comes into use

A step that a kill interrupts is done again from the state before it. So it leaves as it is what it finds done
already: a complete run, a version, an alias, a line of the registry's log.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import CheckpointError, FedLLMError, IntegrityError
from fedllm.identity import public_text
from fedllm.monitoring.drift import DriftRule, add_losses
from fedllm.registry.history import History, history_of
from fedllm.registry.registry import PRODUCTION, Registry
from fedllm.runs.folder import START
from fedllm.signing.statement import read_statement
from scripts.pipeline.gates import GateFigures, compare, gate_figures, judge, passed, told
from scripts.pipeline.runs import Federate, look_at, retrain, run_folder
from scripts.pipeline.settings import Settings
from scripts.pipeline.state import STATE, PipelineState, read_state, write_state

_DAY = 86_400.0  # seconds
WATCH = "watch"


@dataclass(frozen=True)
class Pipeline:
    """What the steps work with: the file's settings, the registry, the key that signs, runs, clock, reader.

    `audit` measures what a finished run memorised; it is called where a gate asks for that.
    """

    settings: Settings
    registry: Registry
    key: Ed25519PrivateKey
    federate: Federate
    audit: Callable[[Path], None]
    now: Callable[[], float]  # seconds since 1970
    tell: Callable[[str], None]
    epsilon_of_run: Callable[[], float] = lambda: 0.0  # that a run of the recipe, as it is now, may spend

    @property
    def folder(self) -> Path:
        """Where state and runs are."""
        return self.settings.path(self.settings.run.folder)

    @property
    def rule(self) -> DriftRule:
        """When a rise of a loss is an alarm."""
        drift = self.settings.drift
        return DriftRule(rounds=drift.looks_between_alarms, least=drift.least)

    def history(self) -> History:
        """Return what the registry's log says."""
        return history_of(self.registry.entries())

    def adapter(self, number: int) -> Path | None:
        """Return the folder of a version; None of version 0, the base model."""
        return self.registry.version(number).folder if number else None

    def note(self, event: str, look: int, **values: Any) -> None:
        """Tell, and add to the registry's log, unless a step that was killed has done so."""
        self.tell(f"{event}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
        known = [entry.get("look") for entry in self.registry.entries() if entry["event"] == event]
        if look not in known:
            self.registry.note(event, look=look, **values)


Step = Callable[[Pipeline, PipelineState], PipelineState]


def tick(pipeline: Pipeline) -> PipelineState:
    """Look at the clients, do all that follows from it, and return the state, which is on disk by then.

    What an earlier process left unfinished is finished first, in place of a new look.

    Raises:
        FedLLMError: a step cannot be done now; the next tick tries it again.
    """
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    state = read_state(pipeline.folder)
    if state.step not in STEPS:
        raise CheckpointError(
            f"{pipeline.folder / STATE}: step {state.step!r} is of another version of fedllm"
        )
    while True:
        state = STEPS[state.step](pipeline, state)
        write_state(pipeline.folder, state)
        if state.step == WATCH:
            return state


def watch(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Add a look to the clients' charts; go on to what it calls for."""
    history = pipeline.history()
    current = history.current.get(PRODUCTION, 0)
    look = look_at(pipeline.federate, pipeline.settings, pipeline.adapter(current))
    charts, drifted = add_losses(state.charts, look.losses, pipeline.rule)
    alarms = {**state.alarms, **{client: state.alarms.get(client, 0) + 1 for client in drifted}}
    state = replace(state, looks=state.looks + 1, losses=look.losses, charts=charts, alarms=alarms)
    state = replace(state, num_rows=look.num_rows, parent=current)
    if drifted:
        pipeline.note("drift", state.looks, version=current, clients=", ".join(drifted))
        # What comes next is learnt from other text, or an earlier version: no client's history is of that.
        state = replace(state, charts={})
    state = replace(state, reason=trigger(pipeline, state, drifted))
    if drifted and (earlier := history.earlier(PRODUCTION)):
        return replace(state, step="compare", target=earlier)
    return _begin(pipeline, state)


def trigger(pipeline: Pipeline, state: PipelineState, drifted: Sequence[str]) -> str:
    """Return why a run is to begin, "" where none is."""
    asked = pipeline.settings.trigger
    if not state.cycle:
        return "first run"
    if state.has_failed:
        return "the run before has failed"
    if drifted and asked.drift:
        return f"drift of {', '.join(drifted)}"
    if not isinstance(asked.new_rows, str) and state.num_rows >= state.rows + asked.new_rows:
        return f"{state.num_rows - state.rows} new rows"
    if not isinstance(asked.every_days, str) and pipeline.now() >= state.begun + asked.every_days * _DAY:
        return f"{asked.every_days:g} days since the last run"
    return ""


def _begin(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Return the state in which the run that was triggered begins, if the budget of epsilon allows it."""
    most = pipeline.settings.gates.epsilon
    if not state.reason:
        return replace(state, step=WATCH)
    if not isinstance(most, str) and state.spent + pipeline.epsilon_of_run() > most:
        pipeline.tell(f"no run ({state.reason}): epsilon {state.spent:.4g} of {most:g} is spent")
        return replace(state, step=WATCH)
    state = replace(state, rows=state.num_rows, begun=pipeline.now(), has_failed=False)
    return replace(state, step="run", cycle=state.cycle + 1)


def compare_versions(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Let the clients measure the version before: where it passes the gates against this one, this one is to
    blame for the alarm.
    """
    look = look_at(pipeline.federate, pipeline.settings, pipeline.adapter(state.target))
    gates = compare(state.losses, look.losses, pipeline.settings.gates.worst_rise)
    if passed(gates):
        return replace(state, step="rollback", gates=gates)
    return _begin(pipeline, state)


def roll_back(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Bring the version before back into use, unless somebody has changed the registry meanwhile."""
    history = pipeline.history()
    if history.current.get(PRODUCTION) != state.target:
        if (history.current.get(PRODUCTION), history.earlier(PRODUCTION)) != (state.parent, state.target):
            pipeline.tell(f"no rollback to version {state.target}: the registry was changed meanwhile")
            return replace(state, step=WATCH)
        pipeline.registry.rollback(PRODUCTION)
    elif state.target not in history.marks:  # a kill may have left the alias behind the log, which this mends
        pipeline.registry.promote(state.target, PRODUCTION)
    pipeline.note("rollback-reason", state.looks, version=state.target, gain=state.gates["held-out"]["value"])
    return replace(state, step=WATCH)


def run(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Train on from the version in use; a run that fails changes nothing but what it may have spent.

    None is begun from a marked version: what it gives would owe as much to the rows that were withdrawn.
    """
    name = run_name(state)
    if state.parent and pipeline.registry.version(state.parent).mark:
        why = f"version {state.parent} is in use and marked; fedllm registry rollback"
        pipeline.note("failed", state.looks, run=name, reason=why)
        return replace(state, step=WATCH, has_failed=True)
    pipeline.tell(f"{name} begins: {state.reason}")
    try:
        folder = retrain(pipeline.federate, pipeline.settings, name, pipeline.adapter(state.parent))
        if pipeline.settings.gates.is_audited:
            pipeline.audit(folder)
    except FedLLMError as error:
        spent = state.spent + pipeline.epsilon_of_run()  # at most
        pipeline.note("failed", state.looks, run=name, reason=str(error))
        return replace(state, step=WATCH, has_failed=True, spent=spent)
    return replace(state, step="judge")


def judge_run(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Hold the new adapter against every gate."""
    figures = gate_figures(run_folder(pipeline.settings, run_name(state)))
    gates = judge(figures, pipeline.settings.gates, spent=state.spent, is_signed=_is_signed(pipeline, state))
    spent = state.spent + (figures.epsilon or 0.0)
    return replace(state, step="add" if passed(gates) else "keep", gates=gates, spent=spent)


def _is_signed(pipeline: Pipeline, state: PipelineState) -> bool | None:
    """Return whether the adapter that the run started from is the version that this pipeline's key signed."""
    if not state.parent:
        return None
    try:
        start = run_folder(pipeline.settings, run_name(state)) / START
        return read_statement(start, [public_text(pipeline.key)]).version == state.parent
    except IntegrityError:
        return False


def keep(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Leave what is in use as it is."""
    pipeline.note("kept", state.looks, run=run_name(state), gates=told(state.gates))
    return replace(state, step=WATCH)


def add(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Make the new adapter a version, signed and with its gates."""
    folder = run_folder(pipeline.settings, run_name(state))
    version = pipeline.registry.add(folder, pipeline.key, state.gates)
    return replace(state, step="promote", target=version.number)


def promote(pipeline: Pipeline, state: PipelineState) -> PipelineState:
    """Bring the new version into use, unless it is marked or another one was put there since its run began.

    A client's history goes on, moved by what the new version gained for this client.
    """
    current = pipeline.history().current.get(PRODUCTION, 0)
    why = pipeline.registry.version(state.target).mark
    if current not in (state.parent, state.target):
        why = f"version {current} was put into use meanwhile"
    if why:
        pipeline.note("kept", state.looks, run=run_name(state), gates=why)
        return replace(state, step=WATCH)
    pipeline.registry.promote(state.target, PRODUCTION)
    pipeline.tell(f"version {state.target} is in use: {state.reason}")
    figures = gate_figures(run_folder(pipeline.settings, run_name(state)))
    return replace(state, step=WATCH, charts=_moved(state, figures))


def _moved(state: PipelineState, figures: GateFigures) -> Mapping[str, Any]:
    gained = {client: figures.after[client] - loss for client, loss in figures.before.items()}
    return {client: chart.moved(gained.get(client, 0.0)) for client, chart in state.charts.items()}


def run_name(state: PipelineState) -> str:
    """Return the name of the newest run."""
    return f"run-{state.cycle:04d}"


STEPS: dict[str, Step] = {
    WATCH: watch,
    "compare": compare_versions,
    "rollback": roll_back,
    "run": run,
    "judge": judge_run,
    "keep": keep,
    "add": add,
    "promote": promote,
}
