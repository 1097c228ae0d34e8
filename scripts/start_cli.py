"""The `fedllm` commands before a first run: recipes, config, init."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(suggest_commands=False)


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="Print this recipe, to keep and change it.")] = "",
) -> None:
    """List the recipes that come with fedllm, or print one: `fedllm recipes keyboard > mine.toml`."""
    from scripts.commands import recipes_command

    recipes_command.recipes(name)


@app.command()
def config(
    key: Annotated[str, typer.Argument(help="A key such as lora.rank, or a section such as lora.")] = "",
    json_schema: Annotated[
        bool, typer.Option("--json-schema", help="Print the schema by which editors complete a recipe.")
    ] = False,
) -> None:
    """Explain a key, a section or all of them: meaning, default and values."""
    from scripts.commands import config_command

    config_command.config(key, json_schema=json_schema)


@app.command()
def init(
    source: Annotated[str, typer.Argument(help="Your text: a file, a folder or a hub id, as data.source.")],
    out: Annotated[Path, typer.Option(help="The recipe that is written.")] = Path("recipe.toml"),
    model: Annotated[str, typer.Option(help="Base model, as model.name.")] = "smollm2-135m-instruct",
    clients: Annotated[str, typer.Option(help="The column whose values are the clients.")] = "",
) -> None:
    """Look at your rows and write a recipe for them, with the reason for each value."""
    from scripts.commands import init_command

    init_command.init(source, out=out, model=model, clients=clients)
