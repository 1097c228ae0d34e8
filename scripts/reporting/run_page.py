"""The page of a run: what it gave and to whom, what it cost, what it may have revealed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.runs.records import RoundRecord
from fedllm.runs.spread import spread_of
from scripts.auditing.table import table_of
from scripts.console import MOST_CLIENTS, NOTHING, in_time
from scripts.reporting.figures import Dot, Figure, Line, dot_chart, line_chart
from scripts.reporting.parts import Page, Section, Table, from_terminal, megabytes, number
from scripts.reporting.run_files import Losses, RunFiles

FOOTER = (
    "Made by fedllm from the public files of the run folder. It names data holders with their losses, so it"
    " is for those who run the federation; what may be published is adapter/ with its card."
)
_MOST_NAMES = 5


def run_page(run: RunFiles) -> Page:
    """Return the page of a run, complete or not."""
    sections = [
        *_curves(run),
        *_by_client(run),
        *_answers(run),
        *_distillation(run),
        *_tasks(run.evaluation.get("tasks", {})),
        *_privacy(run),
        *_audit(run),
        *_rounds(run),
        *_participation(run),
        *_settings(run),
    ]
    return Page(f"Run {run.name}", findings(run), tiles(run), sections, FOOTER)


def findings(run: RunFiles) -> list[str]:
    """Return what a run found, the most important sentence first."""
    lines = []
    at_home, ends = run.at_home(), run.ends()
    if at_home:
        lines.append(_brought(at_home))
    if ends:
        lines.append(_learnt(ends))
    if not at_home and not ends:
        lines.append(
            "It is not known how good the adapter is: no data holder's held-out loss was measured with base"
            " model and adapter, or the data holders keep it to themselves."
        )
    if not at_home and not str(run.keys.get("personal.mode")).startswith("finetune"):
        lines.append(
            "Whether the data holders gained over training alone was not measured: personal.mode = finetune"
            " asks that in a run, and fedllm study compares the two."
        )
    reason = run.result.get("stopped") or run.result.get("reason")
    if run.result.get("status") != "completed":
        lines.append(f"The run failed: {reason}." if reason else "The run is not complete yet.")
    elif reason:
        lines.append(f"It stopped before its last round: {reason}.")
    return [*lines, *(f"Warning: {line}." for line in run.result.get("warnings", ()))]


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """Return the figures that stand at the top."""
    ends, rounds = run.ends(), run.rounds
    found = [("rounds", str(len(rounds))), ("data holders", str(len(_clients(run))))]
    for name, losses in ends.items():
        found.append((f"loss, {name}", number(spread_of(losses).mean)))
    found += [(f"loss, {name}", number(spread_of(losses).mean)) for name, losses in run.at_home().items()]
    spent = rounds[-1].privacy if rounds else None
    epsilon = run.statement.get("epsilon", spent.epsilon if spent else None)
    return [
        *dict(found).items(),
        ("sent up", megabytes(sum(record.bytes_up for record in rounds))),
        ("sent down", megabytes(sum(record.bytes_down for record in rounds))),
        ("time of all rounds", in_time(sum(record.seconds for record in rounds))),
        ("epsilon", "none" if epsilon is None else number(epsilon, 2)),
    ]


def loss_chart(run: RunFiles) -> Figure:
    """Return the held-out losses over the rounds, of each client and of all; training losses without them."""
    by_round = _losses_by_round(run)
    last = by_round[-1][1] if by_round else {}
    listed = sorted(last, key=lambda client: -last[client])[:MOST_CLIENTS]
    lines = [
        Line(client, [(number_of, losses[client]) for number_of, losses in by_round if client in losses])
        for client in listed
    ]
    if lines:
        lines[0] = Line(lines[0].name, lines[0].points, "worst")
        mean = [(number_of, spread_of(losses).mean) for number_of, losses in by_round]
        lines.append(Line("mean of all", mean, "mean"))
    kind = "held-out loss" if len(run.measured) > 1 else "training loss"
    return line_chart(lines, f"{kind} by round", "round", f"{kind}, nats per token")


def _losses_by_round(run: RunFiles) -> list[tuple[int, Mapping[str, float]]]:
    """Return the held-out losses of the rounds that have them; training losses where at most one has."""
    if len(run.measured) > 1:
        return [(record.round_num, record.held_out) for record in run.measured]
    trained = [(record.round_num, record.training.losses) for record in run.rounds]
    return [(number_of, losses) for number_of, losses in trained if losses]


def _curves(run: RunFiles) -> list[Section]:
    by_round = _losses_by_round(run)
    if not by_round:
        return []
    chart, number_of = loss_chart(run), len(by_round[-1][1])
    text = [f"Of {number_of} data holders the {MOST_CLIENTS} with the largest losses are drawn."]
    means = [record.mean_held_out for record in run.measured if record.mean_held_out is not None]
    title = "Training loss by round"
    if len(means) > 1:
        best = min(range(len(means)), key=means.__getitem__)
        moved = "fell" if means[-1] < means[0] else "rose"
        title = f"The mean held-out loss {moved} from {means[0]:.3f} to {means[-1]:.3f}"
        if 0 < best < len(means) - 1:
            title += f"; it was lowest after round {run.measured[best].round_num}"
    return [Section(title, text if number_of > MOST_CLIENTS else (), chart)]


def _brought(at_home: Losses) -> str:
    alone, home = at_home["alone"], at_home["at home"]
    losers = sorted(client for client in home if home[client] >= alone[client])
    told = (
        f"Joining brought {len(home) - len(losers)} of {len(home)} data holders a lower loss than training"
        f" alone: {spread_of(home).mean:.3f} against {spread_of(alone).mean:.3f} on average"
    )
    return f"{told}. Not so: {_named(losers)}." if losers else f"{told}."


def _learnt(ends: Losses) -> str:
    base, shared = ends["base"], ends["shared adapter"]
    before, after = spread_of(base).mean, spread_of(shared).mean
    losers = sorted(client for client in base if shared[client] >= base[client])
    moved = "lowered" if after < before else "raised"
    told = (
        f"Training together {moved} the mean held-out loss from {before:.3f} to {after:.3f} nats per token;"
        f" {len(base) - len(losers)} of {len(base)} data holders are better off than with the base model"
    )
    return f"{told}. Not so: {_named(losers)}." if losers else f"{told}."


def _named(clients: Sequence[str]) -> str:
    more = f" and {len(clients) - _MOST_NAMES} more" if len(clients) > _MOST_NAMES else ""
    return ", ".join(clients[:_MOST_NAMES]) + more


def _by_client(run: RunFiles) -> list[Section]:
    found = []
    if at_home := run.at_home():
        text = ["Each data holder trains alone for as many steps, and on from the shared adapter at home."]
        text.append("Both choose their number of steps on one half of the held-out rows; this is the other.")
        found.append(client_section(_gain_title(at_home, "alone", "at home"), at_home, text))
    if ends := run.ends():
        found.append(client_section(_gain_title(ends, "base", "shared adapter"), ends))
    return found


def _gain_title(columns: Losses, first: str, second: str) -> str:
    gains = {client: loss - columns[second][client] for client, loss in columns[first].items()}
    most, least = (pick(sorted(gains), key=gains.__getitem__) for pick in (max, min))
    if len(gains) == 1:
        return f"{most} gained {gains[most]:.3f} ({first} to {second})"
    return (
        f"{most} gained most, {gains[most]:.3f}, and {least} least, {gains[least]:.3f} ({first} to {second})"
    )


def client_section(title: str, columns: Losses, text: Sequence[str] = ()) -> Section:
    """Return losses by client as dots and, folded away, as a table; of many the largest are drawn."""
    last = list(columns.values())[-1]
    clients = sorted(last, key=lambda client: -last[client])
    drawn = {
        client: {name: Dot(losses[client]) for name, losses in columns.items()}
        for client in clients[:MOST_CLIENTS]
    }
    rows = [[client, *(number(losses[client]) for losses in columns.values())] for client in clients]
    rows.append(["mean", *(number(spread_of(losses).mean) for losses in columns.values())])
    table = Table("the numbers", ["data holder", *columns], rows, is_open=False)
    return Section(title, text, dot_chart(drawn, title, "loss, nats per token"), [table])


def _answers(run: RunFiles) -> list[Section]:
    answers = run.result.get("answers", {})
    rows = list(zip(*(answers.get(name, ()) for name in ("prompts", "before", "after")), strict=False))
    if not rows:
        return []
    changed = sum(before != after for _, before, after in rows)
    cells = [[text.strip() or NOTHING for text in row] for row in rows]
    table = Table("greedy answers", ["prompt", "base model", "with the adapter"], cells, has_texts=True)
    return [Section(f"{changed} of {len(rows)} answers are others than before", tables=[table])]


def _distillation(run: RunFiles) -> list[Section]:
    steps = [(record.round_num, record.distillation) for record in run.rounds if record.distillation]
    if not steps:
        return []
    kept = sum(step.kept for _, step in steps)
    names = ("base model", "aggregate", "distilled", "ensemble", "fine-tuned on the same texts")
    rows = []
    for round_num, step in steps:
        losses = step.losses
        values: list[float | None] = [None] * len(names)
        if losses:
            values = [losses.base, losses.held_out.before, losses.held_out.after]
            values += [losses.ensemble, losses.control]
        rows.append([str(round_num), *map(number, values), step.reason])
    tables = [Table("losses on held-out texts, by round", ["round", *names, "decision"], rows)]
    weights = steps[-1][1].teachers.weights
    teachers = sorted({client for row in weights.values() for client in row})
    if weights:
        shares = [
            [domain, *(f"{row.get(name, 0):.0%}" for name in teachers)] for domain, row in weights.items()
        ]
        tables.append(Table("whom the texts of each domain believed", ["domain", *teachers], shares))
    return [Section(f"Distillation: {kept} of {len(steps)} steps were kept", tables=tables)]


def _tasks(tasks: Mapping[str, Any]) -> list[Section]:
    rows = []
    for name, task in tasks.items():
        for adapter, found in task["adapters"].items():
            for figure, value in found["figures"].items():
                low_high = f"{number(value['low'])} to {number(value['high'])}"
                cells = [name, str(task["items"]), adapter, figure, number(value["value"]), low_high]
                rows.append([*cells, number(task["chance"]), number(task["best_constant"])])
    head = ["task", "items", "adapter", "figure", "value", "95 % interval", "chance", "best constant"]
    return [Section("Tasks", tables=[Table("shares from 0 to 1, or nats", head, rows)])] if rows else []


def _privacy(run: RunFiles) -> list[Section]:
    told = run.statement
    if not told and run.is_private:
        later = "What it covers is stated once the run is complete; the table of rounds has what was spent."
        return [Section("Differential privacy, not stated yet", [later])]
    if not told:
        return [
            Section(
                "No differential privacy was applied",
                ["The adapter may reveal parts of the training text; privacy.epsilon bounds that."],
            )
        ]
    title = f"Differential privacy: epsilon {told['epsilon']:g} for {told['unit_in_words']}"
    text = [
        f"Delta {told['delta']:g}, of a budget of {told['budget']:g}; {told['relation']}."
        f" {told['mechanism']}; {told['trust_in_words']}. Accountant: {told['accountant']}.",
    ]
    rows = [[item] for item in told["does_not_cover"]]
    return [Section(title, text, tables=[Table("not covered", ["what"], rows)])]


def _audit(run: RunFiles) -> list[Section]:
    if not run.audit:
        return []
    if run.audit.get("adapter") != run.result.get("digest"):
        return [Section("The audit is of another adapter than this one")]
    table = from_terminal(table_of(run.audit), "what attacks found, next to controls")
    title = f"Attacks on {run.audit['num_members']} training rows, next to controls"
    return [Section(title, run.audit["notes"], tables=[table])]


def _rounds(run: RunFiles) -> list[Section]:
    rhos = [record.aggregation.rho for record in run.rounds if record.aggregation.rho is not None]
    total = sum(record.bytes_up + record.bytes_down for record in run.rounds)
    text = [
        "rho is by how much averaging the factors A and B would have missed the mean of the products B A, as"
        f" a share of a round's change; at most {max(rhos, default=0.0):.1%} here."
    ]
    head = ["round", "asked", "accepted", "training loss", "held-out loss", "rho", "kept energy", "epsilon"]
    head += ["up", "down", "time"]
    table = Table("every round", head, [_round_row(record) for record in run.rounds], is_open=False)
    title = f"The rounds sent {megabytes(total)} up and down"
    return [Section(title, text if rhos else (), tables=[table])]


def _round_row(record: RoundRecord) -> list[str]:
    return [
        str(record.round_num) + ("" if record.applied else " (not applied)"),
        str(len(record.asked)),
        str(len(record.accepted)),
        number(record.training.loss),
        number(record.mean_held_out),
        number(record.aggregation.rho),
        number(record.aggregation.kept_energy),
        number(record.privacy.epsilon if record.privacy else None),
        megabytes(record.bytes_up),
        megabytes(record.bytes_down),
        in_time(record.seconds),
    ]


def _clients(run: RunFiles) -> list[str]:
    return sorted({name for record in run.records for name in (*record.asked, *record.held_out)})


def _participation(run: RunFiles) -> list[Section]:
    asked, accepted, lost = (
        Counter(name for record in run.rounds for name in getattr(record, kind))
        for kind in ("asked", "accepted", "lost")
    )
    if not asked:
        return []
    reasons = {name: reason for record in run.rounds for name, reason in record.lost.items()}
    rows = [
        [name, str(asked[name]), str(accepted[name]), str(lost[name]), reasons.get(name, "")]
        for name in _clients(run)
    ]
    title = f"Of {asked.total()} requests to train {accepted.total()} were answered by a sound update"
    table = Table(
        "every data holder", ["data holder", "asked", "accepted", "lost", "last reason"], rows, is_open=False
    )
    return [Section(title, tables=[table])]


def _settings(run: RunFiles) -> list[Section]:
    keys = Table("keys", ["key", "value"], list(run.changed_keys().items()), is_open=False)
    made = Table("environment", ["what", "version"], list(run.environment.items()), is_open=False)
    return [Section("What was set to other than the default", tables=[keys, made])]
