"""The progress of one run: a line for every round and, on a terminal, a bar below for what is being done."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

from rich.progress import BarColumn, Progress, RenderableColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from fedllm.config.key import number_or
from fedllm.messages import ClientFailure, ClientUpdate, JoinedClient
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.records import RoundRecord
from scripts.console import Console, in_time, number_text
from scripts.work import MEASURED_AT_HOME, distillation_tokens, rounds_at_home, training_tokens
from strategies.distillation.report import table_cell
from strategies.session import Watch


@dataclass(frozen=True)
class Figure:
    """One figure of a round: its name in a line, and its heading, unit and width in the table.

    Where the terminal is narrow, figures of a high `rank` are left out first.
    """

    name: str
    heading: str
    width: int
    rank: int = 0
    unit: str = ""


def figures_of(plan: RunPlan) -> tuple[Figure, ...]:
    """Return the figures of a run's rounds; those of techniques it does not use are left out."""
    federation, budget = plan.config.federation, number_or(plan.config.privacy.epsilon, 0.0)
    rounds, clients = (2 * len(str(n)) + 1 for n in (federation.num_rounds, plan.cohort.size))
    figures = (
        Figure("round", "round", max(5, rounds)),
        Figure("train loss", "train", 6),
        Figure("held-out", "held-out", 8),
        Figure("clients", "clients", max(7, clients)),
        Figure("lost", "lost", 4, rank=6),  # the cell before says it too
        Figure("up", "MB up", 7, rank=2, unit=" MB"),
        Figure("down", "MB down", 7, rank=3, unit=" MB"),
        Figure("rho", "rho", 5, rank=5),
        Figure("kept", "kept", 6, rank=4),
        Figure("distilled", "distilled", 9, rank=1),
        Figure("time", "seconds", 7, rank=1, unit=" s"),
        Figure("epsilon", "epsilon", len(f"{budget:.2f}/{budget:g}")),
    )
    used = {"distilled": plan.distillation is not None, "epsilon": budget > 0}
    return tuple(figure for figure in figures if used.get(figure.name, True))


def fitting(figures: Sequence[Figure], width: int) -> list[Figure]:
    """Return the figures whose columns fit into `width` cells."""
    kept = list(figures)
    while sum(figure.width for figure in kept) + 2 * (len(kept) - 1) > width:
        least = max(kept, key=lambda figure: figure.rank)
        if not least.rank:
            break
        kept.remove(least)
    return kept


LOST_SHOWN = 20  # clients of a round, a line each; the others are counted


class RunView:
    """Progress of one run, in whichever form the console can show."""

    def __init__(self, console: Console, plan: RunPlan):
        self.console, self.plan = console, plan
        self.figures = figures_of(plan)
        self.num_rounds = plan.config.federation.num_rounds
        self.records: list[RoundRecord] = []  # of this session
        self.has_heading = False
        self.num_lost = 0  # in this round
        self.round_num = 0  # that is being done; 0 measures the base model
        self.ends: float | None = None  # when the run will have ended, on the clock of `progress`
        self.name, self.done, self.number = "", 0, 0  # of the phase
        text = Column(no_wrap=True, overflow="ellipsis")
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=text),
            BarColumn(None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[count]}", table_column=text),
            TimeElapsedColumn(table_column=text),
            RenderableColumn(Countdown(self), table_column=text),
            console=console.rich,
            disable=not console.is_live,
            transient=True,
            expand=True,
        )
        self.task = self.progress.add_task("starting", total=None, count="")

    @contextmanager
    def showing(self) -> Iterator["RunView"]:
        """Keep the bar on the terminal, if there is one, while the block runs."""
        with self.progress:
            yield self

    def watch(self) -> Watch:
        """Return the callables a run reports to."""
        return Watch(
            notice=self.notice, joined=self.joined, phase=self.phase, client=self.client, record=self.record
        )

    def notice(self, text: str) -> None:
        """Show one line of news."""
        self.console.paragraph(text)

    def phase(self, name: str, done: int, number: int) -> None:
        """Show on the bar how much of a phase is done; `number` is 0 where nobody knows of how much."""
        if done == 0 or name != self.name:
            self.progress.reset(self.task)
        self.name, self.done, self.number = name, done, number
        where = f"round {self.round_num}/{self.num_rounds}" if self.round_num else ""
        self.progress.update(
            self.task,
            description=f"{where} {name}".strip(),
            # One node may answer for all clients at once: until then the bar shows that something happens.
            total=number if done else None,
            completed=min(done, number),
            count=f"{done}/{number}" if number else "",
        )

    def joined(self, clients: Mapping[str, JoinedClient]) -> None:
        """Show who takes part."""
        rows = sum(client.num_train for client in clients.values())
        held = sum(client.num_held_out for client in clients.values())
        names = ", ".join(list(clients)[:8]) + (" ..." if len(clients) > 8 else "")
        self.notice(f"{len(clients)} clients joined with {rows} training and {held} held-out rows: {names}")

    def client(self, round_num: int, answer: ClientUpdate | ClientFailure) -> None:
        """Count a client that has answered, and say why where it failed."""
        self.phase("training", self.done + 1, self.number)
        self.num_lost += isinstance(answer, ClientFailure)
        if isinstance(answer, ClientFailure) and self.num_lost <= LOST_SHOWN:
            self.notice(f"round {round_num}: client {answer.client_id} lost: {answer.reason or answer.code}")

    def record(self, record: RoundRecord) -> None:
        """Show a finished round."""
        if self.num_lost > LOST_SHOWN:
            self.notice(f"round {record.round_num}: {self.num_lost - LOST_SHOWN:,} more clients lost")
        self.num_lost = 0
        self.records.append(record)
        left = seconds_left(self.plan, self.records)
        self.ends = None if left is None else self.progress.get_time() + left
        self._show(record, in_time(left) if left else "")
        self.round_num = min(record.round_num + record.applied, self.num_rounds)
        self.phase("", 0, 0)

    def replay(self, record: RoundRecord) -> None:
        """Show a round of an earlier session, which says nothing of how long this one will take."""
        self._show(record, "")
        self.round_num = min(record.round_num + 1, self.num_rounds)

    def _show(self, record: RoundRecord, left: str) -> None:
        cells = self._cells(record)
        if not self.console.is_live:
            shown = [f"{name} {cell}" for name, cell in cells.items() if cell]
            self.console.line("  " + " · ".join([*shown, *([f"left {left}"] if left else [])]))
            return
        figures = fitting(self.figures, self.console.rich.width)
        if not self.has_heading:
            self.console.line(_row([(figure.heading, figure.width) for figure in figures]), style="bold")
            self.has_heading = True
        self.console.line(_row([(cells[each.name].removesuffix(each.unit), each.width) for each in figures]))

    def _cells(self, record: RoundRecord) -> dict[str, str]:
        is_base, kept = record.round_num == 0, record.aggregation.kept_energy
        epsilon, budget = record.privacy.epsilon if record.privacy else 0.0, self.plan.config.privacy.epsilon
        cells = {
            "round": f"{record.round_num}/{self.num_rounds}",
            "train loss": number_text(record.training.loss),
            "held-out": number_text(record.mean_held_out),
            "clients": "" if is_base else f"{len(record.accepted)}/{len(record.asked)}",
            "lost": str(len(record.lost)) if record.lost else "",
            "up": "" if is_base else f"{record.bytes_up / 1e6:.2f} MB",
            "down": "" if is_base else f"{record.bytes_down / 1e6:.2f} MB",
            "rho": number_text(record.aggregation.rho),
            "kept": "" if kept is None else f"{kept:.1%}",
            "distilled": table_cell(record.distillation),
            "time": f"{record.seconds:.1f} s" if record.seconds else "",
            "epsilon": f"{epsilon:.2f}/{number_or(budget, 0.0):g}",
        }
        return {figure.name: cells[figure.name] for figure in self.figures}


@dataclass(frozen=True, eq=False)
class Countdown:
    """The time that a run has left, each time that the bar is drawn."""

    view: RunView

    def __rich__(self) -> Text:
        """Return it in words, "" where it is not known or over."""
        left = 0.0 if self.view.ends is None else self.view.ends - self.view.progress.get_time()
        return Text(f"about {in_time(left)} left" if left >= 1 else "")


def seconds_left(plan: RunPlan, records: Sequence[RoundRecord]) -> float | None:
    """Return how long the rounds after the last of `records` will take; None where no round tells yet.

    Each round costs what its kind cost before: all train, some measure held-out losses, some distil. A kind
    of which there was none yet is counted in tokens, at the rate of training.
    """
    rounds = [record for record in records if record.round_num > 0 and record.applied]
    if not rounds:
        return None
    evaluation = fmean([record.seconds for record in records if record.round_num == 0] or [0.0])
    steps = [record.distillation.seconds for record in rounds if record.distillation]

    def training_of(record: RoundRecord) -> float:
        rest = record.seconds - (record.distillation.seconds if record.distillation else 0.0)
        return max(0.0, rest - evaluation * bool(record.held_out))

    training = fmean(training_of(record) for record in rounds)
    distillation = fmean(steps) if steps else 0.0
    if plan.distillation is not None and not steps:
        trained = fmean(record.training.num_tokens for record in rounds)
        distillation = training * distillation_tokens(plan.distillation) / max(1.0, training_tokens(trained))
    left = range(rounds[-1].round_num + 1, plan.config.federation.num_rounds + 1)
    distils = [plan.distillation is not None and plan.distillation.is_due(number) for number in left]
    # Clients that judge a distilled adapter measure it and the one before it.
    asked = plan.distillation is not None and plan.distillation.asks_clients
    measured = [
        2 if due and asked else plan.is_evaluated(number) for number, due in zip(left, distils, strict=True)
    ]
    trainings = len(left) + rounds_at_home(plan)
    evaluations = sum(measured) + (MEASURED_AT_HOME if plan.at_home is not None else 0)
    return trainings * training + sum(distils) * distillation + evaluations * evaluation


def _row(cells: Sequence[tuple[str, int]]) -> str:
    return "  ".join(text.rjust(width) for text, width in cells)
