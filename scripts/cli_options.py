"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

SITE_KEY = Path("~/.config/fedllm/site.key")  # where `fedllm keys new` puts a key
# Of an audit: most rows, tokens given and tokens to be given back, passes of the positive control.
AUDIT_ROWS, AUDIT_PREFIX, AUDIT_SUFFIX, AUDIT_EPOCHS = 500, 50, 50, 12


def complete_word(incomplete: str) -> list[str]:
    """Return the shipped recipes and the keys that begin with what was typed, for a shell's completion."""
    from fedllm.config.run_config import KEYS
    from scripts.recipe_arguments import shipped_recipes

    return [
        word for word in (*shipped_recipes(), *(f"{key}=" for key in KEYS)) if word.startswith(incomplete)
    ]


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [key=value ...]",
        help="A recipe: a .toml or .yaml file, or a name of `fedllm recipes` (none = quickstart); overrides.",
        autocompletion=complete_word,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
OnBadRow = Annotated[str, typer.Option("--on-bad-row", help="skip | stop", show_default="skip")]
Base = Annotated[
    str, typer.Option(help="The base model's folder or file, where the adapter does not name it.")
]
