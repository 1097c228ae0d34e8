"""`fedllm init`: look at a person's rows and write a recipe for them."""

import shlex
from pathlib import Path

from rich.table import Table

from clients.process import Process
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Fields, count_reasons
from fedllm.data.rows import Rows, read_rows
from fedllm.errors import ConfigError
from fedllm.files import write_file
from fedllm.models.base import describe_layout, load_tokenizer
from fedllm.models.files import resolve_model
from fedllm.plan.run_plan import resolve
from scripts.commands.check_command import figures_of
from scripts.console import Console, one_line
from scripts.data_survey import LIMITS, Survey, survey
from scripts.plan_page import what_it_costs, who_has_rows
from scripts.suggested_recipe import as_toml, choose

_FOREIGN = 1.0  # tokens a character; a tokenizer that knows a script needs well below one


def init(source: str, *, out: Path, model: str, clients: str) -> None:
    """Print what the rows are, and write a recipe for them to `out`.

    Raises:
        ConfigError: `out` is there already or no TOML file, or `clients` names no column.
        FedLLMError: the rows or the model cannot be read.
    """
    if out.suffix != ".toml":
        raise ConfigError(f"--out {out}: the recipe is TOML; name it {out.stem}.toml")
    if out.exists():
        raise ConfigError(f"{out} is there already; name another file with --out")
    console, rows = Console(), read_rows(source)
    found = survey(rows, load_tokenizer(resolve_model(model)), clients)
    choices = choose(found, source, model, out.stem)
    config = RunConfig.from_flat({choice.key: choice.value for choice in choices})
    plan, holder = resolve(config), Process().open(config.to_flat(), {"server-paths": True})
    layout = describe_layout(config.model, config.lora)
    costs = what_it_costs(plan, layout, holder, figures_of(plan, holder))
    _print_rows(console, rows, found)
    _print_lengths(console, found, config.train.max_length)
    console.line("the run", style="bold")
    for line in (*who_has_rows(holder), *costs):
        console.paragraph(line)
    heading = f"Written by `fedllm init {shlex.quote(source)}` for {found.num_rows:,} rows."
    write_file(out, as_toml(choices, [heading, *_advice(found)]))
    console.line(f"\nrecipe:   {out}, with the reason for each value")
    console.line(f"next:     fedllm check {shlex.quote(str(out))}")


def _print_rows(console: Console, rows: Rows, found: Survey) -> None:
    files = f" in {len(rows.files)} files" if len(rows.files) > 1 else ""
    console.line(f"{len(rows.rows):,} rows{files}", style="bold")
    if rows.bad:
        console.paragraph(f"{len(rows.bad)} rows cannot be read: {count_reasons(rows.bad)}")
    table = Table("  column", "rows", "characters", "values", box=None, pad_edge=False)
    for column in found.columns:
        values = f"{len(column.sizes):,}" if column.sizes else "not text"
        table.add_row(
            f"  {one_line(column.name, 40)}", f"{column.filled:,}", f"{column.characters:.0f}", values
        )
    console.rich.print(table)
    console.paragraph(f"learnt:   {_told_of(found.fields)}")
    owners = [f"{column.name} ({len(column.sizes):,} values)" for column in found.owners[:3]]
    console.paragraph(f"clients:  {', or '.join(owners) or 'no column names an owner'}")
    shares = [f"{share:.0%} {script}" for script, share in found.scripts.items() if share >= 0.01]
    console.paragraph(f"letters:  {', '.join(shares)}")
    for line in _advice(found):
        console.paragraph(f"note:     {line}")


def _told_of(fields: Fields) -> str:
    if fields.text:
        return f"the whole of {fields.text}"
    if fields.conversation:
        return f"the answers of the conversation in {fields.conversation}"
    prompt = " and ".join(each for each in (fields.system, fields.prompt, fields.subject) if each)
    return f"{fields.response} as the answer to {prompt}"


def _print_lengths(console: Console, found: Survey, chosen: int) -> None:
    console.line("length in tokens", style="bold")
    table = Table("  train.max-length", "whole", "cut", "no answer", box=None, pad_edge=False)
    place = LIMITS.index(chosen)
    for limit in LIMITS[max(0, place - 3) : place + 2]:
        cut, lost = found.lengths.cut(limit), found.lengths.lost(limit)
        mark = " <- taken" if limit == chosen else ""
        table.add_row(f"  {limit:,}{mark}", f"{1 - cut:.0%}", f"{cut - lost:.0%}", f"{lost:.0%}")
    console.rich.print(table)


def _advice(found: Survey) -> list[str]:
    """Return what a person should know of the model on these rows."""
    rate = sum(found.lengths.whole) / max(1, found.lengths.characters)
    if rate < _FOREIGN:
        return []
    script = next(iter(found.scripts), "this text")
    return [
        f"The model reads {script} in {rate:.1f} tokens a character: it was not made for it. One that was,"
        " such as Qwen/Qwen3-0.6B from the hub, needs fewer and knows the language.",
    ]
