"""The page of two runs: where they differ, and which of them served whom better."""

from collections.abc import Collection
from statistics import fmean

from fedllm.runs.spread import keep_common_clients, spread_of
from scripts.console import in_time
from scripts.reporting.figures import Line, line_chart
from scripts.reporting.parts import Page, Section, Table, megabytes, number
from scripts.reporting.run_files import UNSHOWN, RunFiles, shown_value
from scripts.reporting.run_page import FOOTER, client_section


def compared_page(first: RunFiles, second: RunFiles) -> Page:
    """Return the page of two runs; losses are compared on the clients that both measured."""
    names = _names(first, second)
    runs = dict(zip(names, (first, second), strict=True))
    last = {name: run.measured[-1].held_out if run.measured else {} for name, run in runs.items()}
    columns = keep_common_clients(last)
    columns = columns if len(columns) == 2 and all(columns.values()) else {}
    sections = []
    if columns:
        finding, title = _findings(columns)
        lines = [
            Line(name, _means(run, columns[name]), tone)
            for (name, run), tone in zip(runs.items(), ("mean", "worst"), strict=True)
        ]
        chart = line_chart(lines, "mean held-out loss", "round", "mean held-out loss, nats per token")
        sections = [Section("Mean held-out loss by round", (), chart), client_section(title, columns)]
    else:
        finding = f"{names[0]} and {names[1]} measured no data holder's held-out loss in common."
    sections += [_costs(runs), _settings(runs)]
    return Page(f"{names[0]} and {names[1]}", [finding], (), sections, FOOTER)


def _means(run: RunFiles, clients: Collection[str]) -> list[tuple[int, float]]:
    """Return (round, mean loss of these clients) of the rounds that measured all of them."""
    losses = [(record.round_num, record.held_out) for record in run.measured]
    return [
        (number_of, fmean(found[client] for client in clients))
        for number_of, found in losses
        if found.keys() >= set(clients)
    ]


def _names(first: RunFiles, second: RunFiles) -> tuple[str, str]:
    if first.name != second.name:
        return first.name, second.name
    return f"{first.name} (first)", f"{second.name} (second)"


def _findings(columns: dict[str, dict[str, float]]) -> tuple[str, str]:
    """Return the headline, and the title of the losses by client."""
    (one, ones), (two, twos) = columns.items()
    means = {one: spread_of(ones).mean, two: spread_of(twos).mean}
    ahead, behind = sorted(means, key=means.__getitem__)
    better = sum(columns[ahead][client] < columns[behind][client] for client in ones)
    if means[one] == means[two]:
        return f"{one} and {two} end at the same mean held-out loss, {means[one]:.3f}.", "By data holder"
    return (
        f"{ahead} ends at a mean held-out loss of {means[ahead]:.3f}, {behind} at {means[behind]:.3f}.",
        f"{better} of {len(ones)} data holders are better served by {ahead}",
    )


def _costs(runs: dict[str, RunFiles]) -> Section:
    rounds = [run.rounds for run in runs.values()]
    epsilons = [records[-1].privacy if records else None for records in rounds]
    rows = [
        ["rounds", *(str(len(records)) for records in rounds)],
        ["sent up", *(megabytes(sum(one.bytes_up for one in records)) for records in rounds)],
        ["sent down", *(megabytes(sum(one.bytes_down for one in records)) for records in rounds)],
        ["time of all rounds", *(in_time(sum(one.seconds for one in records)) for records in rounds)],
        ["epsilon", *(number(each.epsilon, 2) if each else "none" for each in epsilons)],
    ]
    return Section("What they cost", tables=[Table("totals", ["", *runs], rows)])


def _settings(runs: dict[str, RunFiles]) -> Section:
    first, second = (run.keys for run in runs.values())
    keys = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    rows = [
        [key, *(shown_value(keys_of.get(key, "")) for keys_of in (first, second))]
        for key in keys
        if key not in UNSHOWN
    ]
    title = f"{len(rows)} settings differ" if rows else "No setting differs"
    return Section(title, tables=[Table("keys", ["key", *runs], rows)] if rows else ())
