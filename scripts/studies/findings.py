"""What a study says to a person: a table of its methods, and sentences about whom joining helped."""

from collections.abc import Mapping

from rich.table import Table

from scripts.console import in_time, number_text
from scripts.reports import figures_table
from scripts.studies.cells import METHODS
from scripts.studies.summary import Summary, changes

JOINING = ("private-home", "home", "private", "distilled", "federated", "one-shot")  # what is told of first
_MOST_NAMES = 5


def study_tables(result: Summary) -> list[Table]:
    """Return the methods of a study, a line each: their losses, then their costs."""
    summary = result["summary"]
    title = "held-out loss in nats per token; gained: below alone, own best / equal tokens"
    columns = ("loss", "+-", "worst", "others' text", "gained", "gap closed")
    return [
        figures_table(title, columns, {name: _losses(found) for name, found in summary.items()}),
        figures_table(
            "cost of one seed",
            ("tokens", "MB up", "time", "epsilon", "rate", "steps"),
            {name: _costs(found) for name, found in summary.items()},
        ),
    ]


def _losses(found: Summary) -> list[str]:
    gap = found["gap_closed"]
    shares = [part["gained_over_alone"] for part in (found, found["at_equal_tokens"])]
    return [
        number_text(found["mean"]),
        number_text(found["deviation"]),
        number_text(found["worst"]["loss"]),
        number_text(found["others"]["mean"]),
        "" if None in shares else " / ".join(f"{share:.0%}" for share in shares),
        f"{gap['value']:.0%} ({gap['low']:.0%}-{gap['high']:.0%})" if gap else "",
    ]


def _costs(found: Summary) -> list[str]:
    return [
        f"{found['tokens']:,}" if found["tokens"] else "",
        f"{found['bytes'] / 1e6:.3g}" if found["bytes"] else "",
        in_time(found["seconds"]),
        number_text(found["epsilon"], 2),
        f"{found['rate']:g}" if found["rate"] else "",
        f"{found['steps']:.0f}" if found["tokens"] else "",
    ]


def findings(result: Summary) -> list[str]:
    """Return what joining brought and to whom it did not, a sentence a line; [] without a comparison."""
    summary = result["summary"]
    joined = [method for method in JOINING if method in summary]
    if "alone" not in summary or not joined:
        return []
    lines = [_brought(summary, joined[0])]
    if joined[0].endswith("home") and "federated" in joined:
        lines.append(_shared(summary["federated"]))
    gap = summary[joined[0]]["gap_closed"]
    if gap:
        lines.append(
            f"Against one adapter on everybody's rows it closes {gap['value']:.0%} of the way from the base"
            f" model ({gap['low']:.0%} to {gap['high']:.0%}, 95 % over clients)."
        )
    return [*lines, *_limits(result)]


def _brought(summary: Mapping[str, Summary], method: str) -> str:
    """Return for how many clients a method is better than training alone, by how much, and for whom not."""
    own, alone = summary[method], summary["alone"]
    change = changes(alone["clients"], own["clients"])
    losers = {name: loss for name, loss in change.items() if loss >= 0}
    named = [f"{name} ({loss:+.3f})" for name, loss in sorted(losers.items(), key=lambda pair: -pair[1])]
    more = f" and {len(named) - _MOST_NAMES} more" if len(named) > _MOST_NAMES else ""
    told = (
        f"Joining ({METHODS[method]}) gives {len(change) - len(losers)} of {len(change)} clients a lower loss"
        f" than training alone, each at its best: {own['mean']:.3f} against {alone['mean']:.3f} on average"
    )
    return f"{told}. Not to {', '.join(named[:_MOST_NAMES])}{more}." if named else f"{told}."


def _shared(found: Summary) -> str:
    share, others = found["gained_over_alone"], found["others"]["no_worse_than_alone"]
    told = f"The shared adapter by itself is better than training alone for {share:.0%} of the clients"
    if others is None:
        return f"{told}."
    return f"{told}; on the text of all others it is no worse for {others:.0%}."


def _limits(result: Summary) -> list[str]:
    """Return what is in the way of a fair answer: rates at the edge of the grid, methods that failed."""
    rates, summary = result["rates"], result["summary"]
    at_edge = [
        f"{name} ({found['rate']:g})"
        for name, found in summary.items()
        if len(rates) > 1 and found["rate"] in (min(rates), max(rates))
    ]
    lines = (
        [f"At an edge of --rates, beyond which it may be better: {', '.join(at_edge)}."] if at_edge else []
    )
    return [
        *lines,
        *(
            f"{one['method']} with seed {one['seed']} at rate {one['rate']:g}: {one['reason']}"
            for one in result["failed"]
        ),
    ]
