"""What a person sees: one live table of rounds, plain lines where there is no terminal, and a summary."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
from rich.live import Live
from rich.table import Table

from fedllm.config.key import number_or
from fedllm.config.run_config import RunConfig
from fedllm.messages import ClientFailure, ClientUpdate, JoinedClient
from fedllm.runs.records import RoundRecord
from fedllm.runs.spread import keep_common_clients, spread_of
from strategies.distillation.report import table_cell
from strategies.session import Watch

_COLUMNS = (
    *("round", "train loss", "held-out", "clients", "lost", "up", "down"),
    *("rho", "kept", "distilled", "time", "left"),
)


class Console:
    """Prints to stdout, or only notices to stderr where stdout must hold JSON."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self.rich = rich.console.Console(stderr=quiet, highlight=False, markup=False)

    def line(self, text: str) -> None:
        """Print one line."""
        self.rich.print(text, soft_wrap=True)

    @contextmanager
    def watching(self, config: RunConfig, runtime: str) -> Iterator["RunView"]:
        """Yield a view of a run: a live table on a terminal, plain lines elsewhere."""
        federation, train = config.federation, config.train
        self.line(
            f"{config.run.name}: {config.model.name}, LoRA rank {config.lora.rank} on"
            f" {config.lora.target_modules}, {federation.num_clients} clients,"
            f" {federation.num_rounds} rounds of {train.local_steps} steps of {train.batch_size} rows,"
            f" {runtime} runtime"
        )
        view = RunView(self, federation.num_rounds, number_or(config.privacy.epsilon, 0.0))
        if not self.rich.is_terminal or self.quiet:
            yield view
            return
        with Live(view.table, console=self.rich, refresh_per_second=4, transient=False) as live:
            view.live = live
            yield view

    def summary(self, folder: Path, result: Mapping[str, Any], answers: Any) -> None:
        """Print held-out losses, answers before and after, where the adapter is and what to do next."""
        held_out = result["held_out"]
        if held_out:
            personal = held_out["after"].get("personal", {"clients": {}})
            columns = {"base": held_out["before"], "adapter": held_out["after"], "+ personal": personal}
            self.rich.print(loss_table({name: part["clients"] for name, part in columns.items()}))
        for prompt, before, after in zip(answers.prompts, answers.before, answers.after, strict=True):
            self.line(f"\n  {prompt}\n    before: {one_line(before)}\n    after:  {one_line(after)}")
        self.line(f"\nadapter: {result['adapter']}\nnext:    fedllm evaluate {shown_path(folder)}")


class RunView:
    """Progress of one run, in whichever form the console can show."""

    def __init__(self, console: Console, num_rounds: int, budget: float = 0.0):
        self.console = console
        self.num_rounds = num_rounds
        self.budget = budget  # epsilon; 0 = no differential privacy
        self.columns = (*_COLUMNS, "epsilon") if budget else _COLUMNS
        self.live: Live | None = None
        self.num_done, self.seconds = 0, 0.0  # rounds of this session, and how long they took
        self.table = Table(*self.columns, box=None, header_style="bold", pad_edge=False)
        self.answered = 0

    def watch(self) -> Watch:
        """Return the callables a run reports to."""
        return Watch(notice=self.notice, joined=self.joined, client=self.client, record=self.record)

    def notice(self, text: str) -> None:
        """Show one line of news."""
        self.console.line(f"  {text}")

    def joined(self, clients: Mapping[str, JoinedClient]) -> None:
        """Show who takes part."""
        rows = sum(client.num_train for client in clients.values())
        held = sum(client.num_held_out for client in clients.values())
        names = ", ".join(list(clients)[:8]) + (" ..." if len(clients) > 8 else "")
        self.notice(f"{len(clients)} clients joined with {rows} training and {held} held-out rows: {names}")

    def client(self, round_num: int, answer: ClientUpdate | ClientFailure) -> None:
        """Show that a client has answered, and why where it failed."""
        self.answered += 1
        if isinstance(answer, ClientFailure):
            self.notice(f"round {round_num}: client {answer.client_id} lost: {answer.reason or answer.code}")
        elif self.live is not None:
            self.table.caption = f"round {round_num}: client {answer.client_id} answered ({self.answered})"

    def record(self, record: RoundRecord) -> None:
        """Show a finished round."""
        self.answered = 0
        self.table.caption = None
        self.num_done += record.round_num > 0 and record.applied
        self.seconds += record.seconds
        self._show(record, self._left(record.round_num))

    def replay(self, record: RoundRecord) -> None:
        """Show a round of an earlier session, which says nothing of how long this one will take."""
        self._show(record, "")

    def _left(self, round_num: int) -> str:
        """Return how long the rounds after this one will take, if they are like this session's."""
        if not self.num_done or round_num >= self.num_rounds:
            return ""
        return f"{self.seconds / self.num_done * (self.num_rounds - round_num):.0f} s"

    def _show(self, record: RoundRecord, left: str) -> None:
        cells = self._cells(record, left)
        self.table.add_row(*cells)
        if self.live is None:
            shown = (f"{name} {cell}" for name, cell in zip(self.columns, cells, strict=True) if cell)
            self.console.line("  " + " · ".join(shown))

    def _cells(self, record: RoundRecord, left: str) -> tuple[str, ...]:
        is_base, kept = record.round_num == 0, record.aggregation.kept_energy
        epsilon = record.privacy.epsilon if record.privacy else 0.0
        spent = (f"{epsilon:.2f}/{self.budget:g}",) if self.budget else ()
        return (
            f"{record.round_num}/{self.num_rounds}",
            _number(record.training.loss),
            _number(record.mean_held_out),
            "" if is_base else f"{len(record.accepted)}/{len(record.asked)}",
            str(len(record.lost)) if record.lost else "",
            "" if is_base else f"{record.bytes_up / 1e6:.2f} MB",
            "" if is_base else f"{record.bytes_down / 1e6:.2f} MB",
            _number(record.aggregation.rho, 3),
            "" if kept is None else f"{kept:.1%}",
            table_cell(record.distillation),
            f"{record.seconds:.1f} s" if record.seconds else "",
            left,
            *spent,
        )


def loss_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Return held-out loss per client in named columns (empty ones are left out), and how it is spread.

    The change is from the first column to the last.
    """
    shown = keep_common_clients(columns)
    table = Table("client", *shown, "change", box=None, header_style="bold", pad_edge=False)
    clients = list(next(iter(shown.values()), ()))
    for client in clients:
        _add_losses(table, client, [losses[client] for losses in shown.values()])
    if clients:
        spreads = [spread_of(losses) for losses in shown.values()]
        _add_losses(table, "mean", [spread.mean for spread in spreads], style="bold")
        _add_losses(table, "worst", [spread.worst for spread in spreads])
        _add_losses(table, "worst - best", [spread.spread for spread in spreads])
        _add_losses(table, "deviation", [spread.deviation for spread in spreads])
    return table


def _add_losses(table: Table, name: str, losses: Sequence[float], style: str = "") -> None:
    table.add_row(name, *map(_number, losses), f"{losses[-1] - losses[0]:+.3f}", style=style)


def one_line(text: str, width: int = 100) -> str:
    """Return text on one line, shortened."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def shown_path(path: Path) -> str:
    """Return a path relative to here where that is shorter."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
