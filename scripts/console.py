"""What a person sees: lines as wide as the terminal, tables of losses, and a summary of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedllm.runs.spread import keep_common_clients, spread_of

NOTHING = "(nothing)"  # what is shown of an answer that ends at once
MOST_BEHIND = 5  # names of clients that joining brought nothing
MOST_CLIENTS = 20  # that a table lists one by one; beyond, those with the largest losses


class Console:
    """Prints to stdout, or only notices to stderr where stdout must hold JSON."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self.rich = rich.console.Console(stderr=quiet, highlight=False, markup=False)

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal on which lines may change."""
        return self.rich.is_terminal and not self.quiet

    def line(self, text: str, style: str = "") -> None:
        """Print one line as it is, so that a path or a command in it can be copied."""
        self.rich.print(text, soft_wrap=True, style=style)

    def paragraph(self, text: str, indent: int = 2) -> None:
        """Print one line; on a terminal it is broken between words where it is too long."""
        if self.is_live:
            self.rich.print(Padding(Text(text), (0, 0, 0, indent), expand=False))
        else:
            self.line(" " * indent + text)

    def answers(self, prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
        """Print what base model and adapter answer, a line each."""
        width = self.rich.width - 12 if self.is_live else 100
        for prompt, *texts in zip(prompts, before, after, strict=True):
            self.line(f"\n  {one_line(prompt, width + 10)}")
            for name, text in zip(("before:", "after: "), texts, strict=True):
                self.line(f"    {name} {one_line(text, width) or NOTHING}")

    def at_home(self, found: Mapping[str, Any]) -> None:
        """Print what each client has alone, of the shared adapter, and after training that on at home."""
        clients = found["clients"]
        self.line("\nwhat joining brought (held-out loss on rows that chose nothing)", style="bold")
        names = {"alone": "alone", "shared": "shared", "home": "at home"}
        self.rich.print(
            loss_table({name: {who: one[key] for who, one in clients.items()} for key, name in names.items()})
        )
        self.paragraph(joining_line(found), indent=0)

    def summary(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Print held-out losses, answers before and after, what came out, where it is and what to do next."""
        held_out, shown = result["held_out"], shown_path(folder)
        if held_out:
            personal = held_out["after"].get("personal", {"clients": {}})
            columns = {"base": held_out["before"], "adapter": held_out["after"], "+ personal": personal}
            self.rich.print(loss_table({name: part["clients"] for name, part in columns.items()}))
        if "at_home" in result:
            self.at_home(result["at_home"])
        answers = result.get("answers", {"prompts": (), "before": (), "after": ()})
        self.answers(answers["prompts"], answers["before"], answers["after"])
        if "rows_lost" in result:
            self.paragraph(f"rows: {result['rows_lost']}", indent=0)
        if "stopped" in result:
            self.paragraph(f"stopped after round {result['rounds']}: {result['stopped']}", indent=0)
        self.line(f"\nadapter: {shown}/adapter\ncard:    {shown}/adapter/README.md (results, how to load it)")
        self.line(f"report:  {shown}/report.html (fedllm report {shown} --open)")
        self.line(f"next:    fedllm evaluate {shown}")
        for line in result.get("warnings", ()):
            self.paragraph(f"warning: {line}", indent=0)


def client_table(*headings: str) -> Table:
    """Return an empty table of figures by client; where it is too wide, names are cut and never figures."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("client", overflow="ellipsis")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def loss_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Return held-out loss per client in named columns (empty ones are left out), and how it is spread.

    The change is from the first column to the last. Of more than `MOST_CLIENTS` only those with the largest
    losses in the last column are listed; the spread is that of all.
    """
    shown = keep_common_clients(columns)
    table = client_table(*shown, "change")
    clients = list(next(iter(shown.values()), ()))
    last = list(shown.values())[-1] if shown else {}
    listed = set(sorted(clients, key=lambda client: -last[client])[:MOST_CLIENTS])
    for client in clients:
        if client in listed:
            _add_losses(table, client, [losses[client] for losses in shown.values()])
    if len(clients) > len(listed):
        table.add_row(f"and {len(clients) - len(listed)} with lower losses", style="dim")
    if clients:
        spreads = [spread_of(losses) for losses in shown.values()]
        _add_losses(table, "mean", [spread.mean for spread in spreads], style="bold")
        _add_losses(table, "worst", [spread.worst for spread in spreads])
        _add_losses(table, "worst - best", [spread.spread for spread in spreads])
        _add_losses(table, "deviation", [spread.deviation for spread in spreads])
    return table


def _add_losses(table: Table, name: str, losses: Sequence[float], style: str = "") -> None:
    table.add_row(name, *map(number_text, losses), f"{losses[-1] - losses[0]:+.3f}", style=style)


def joining_line(found: Mapping[str, Any]) -> str:
    """Return who is better off for having joined, and who is not, in a sentence."""
    clients, mean = found["clients"], found["mean"]
    behind = [name for name, one in clients.items() if not one["home"] < one["alone"]]
    more = f" and {len(behind) - MOST_BEHIND} more" if len(behind) > MOST_BEHIND else ""
    who = f"; not {', '.join(behind[:MOST_BEHIND])}{more}" if behind else ""
    return (
        f"what joining brought: {len(clients) - len(behind)} of {len(clients)} clients better than alone"
        f" (mean {mean['home']:.3f} at home, {mean['alone']:.3f} alone, {mean['shared']:.3f} shared){who}"
    )


def one_line(text: str, width: int = 100) -> str:
    """Return text on one line of at most `width` cells (a Korean letter takes two), shortened."""
    flat = Text(" ".join(text.split()))
    flat.truncate(width, overflow="ellipsis")
    return flat.plain


def in_time(seconds: float) -> str:
    """Return a time as a person says it: 12 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def shown_path(path: Path) -> str:
    """Return a path relative to here where that is shorter."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def number_text(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits after the point; "" for none."""
    return "" if value is None else f"{value:.{digits}f}"
