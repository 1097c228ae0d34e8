"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE.toml] [key=value ...]", help="A recipe (none = quickstart) and overrides."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
OnBadRow = Annotated[str, typer.Option("--on-bad-row", help="skip | stop", show_default="skip")]
Base = Annotated[
    str, typer.Option(help="The base model's folder or file, where the adapter does not name it.")
]
