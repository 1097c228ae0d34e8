"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [key=value ...]",
        help="A recipe: a .toml or .yaml file, or a name of `fedllm recipes` (none = quickstart); overrides.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
OnBadRow = Annotated[str, typer.Option("--on-bad-row", help="skip | stop", show_default="skip")]
Base = Annotated[
    str, typer.Option(help="The base model's folder or file, where the adapter does not name it.")
]
