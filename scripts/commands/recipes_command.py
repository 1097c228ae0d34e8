"""`fedllm recipes`: the recipes that come with fedllm."""

import typer
from rich.table import Table

from fedllm.errors import ConfigError
from scripts.console import Console
from scripts.recipe_arguments import first_comment, shipped_recipes


def recipes(name: str) -> None:
    """List the shipped recipes with what each is for, or print one of them as it is."""
    shipped = shipped_recipes()
    if name:
        if name not in shipped:
            raise ConfigError(f"no recipe {name!r}; there are {', '.join(shipped)}")
        typer.echo(shipped[name].read_text(), nl=False)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for each, path in shipped.items():
        table.add_row(each, first_comment(path))
    console = Console()
    console.rich.print(table)
    console.line("\nnext: fedllm check NAME, fedllm run NAME, or fedllm recipes NAME > mine.toml")
