"""`fedllm registry`: versions of a model, which of them is in use, and how each came about."""

from pathlib import Path
from typing import Annotated

import typer

from scripts.cli_options import Json

app = typer.Typer(
    help="Signed versions of a model, and which is in use.", no_args_is_help=True, suggest_commands=False
)
Folder = Annotated[Path, typer.Argument(metavar="REGISTRY", help="Its folder, named as the model.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="A number, or an alias such as production.")]
Alias = Annotated[str, typer.Option(help="The alias to move.")]


@app.command("list")
def list_versions(folder: Folder, json: Json = False) -> None:
    """List the versions, which aliases point to them, and why one is marked."""
    from scripts.commands import registry_command

    registry_command.list_versions(folder, as_json=json)


@app.command()
def show(folder: Folder, version: Version = "production", json: Json = False) -> None:
    """Show how a version came about: parents, configuration, code, data, privacy, consent, gates."""
    from scripts.commands import registry_command

    registry_command.show(folder, version, as_json=json)


@app.command()
def add(
    folder: Folder,
    source: Annotated[Path, typer.Argument(help="A finished run, or an adapter folder.")],
    key: Annotated[Path, typer.Option(help="The signing key's file; `fedllm keys new` makes one.")],
    json: Json = False,
) -> None:
    """Sign an adapter and keep it as the next version."""
    from scripts.commands import registry_command

    registry_command.add(folder, source, key, as_json=json)


@app.command()
def promote(folder: Folder, version: Version, alias: Alias = "production", json: Json = False) -> None:
    """Let an alias point to a version, once its files are checked and its gates were passed."""
    from scripts.commands import registry_command

    registry_command.promote(folder, version, alias, as_json=json)


@app.command()
def rollback(folder: Folder, alias: Alias = "production", json: Json = False) -> None:
    """Let an alias point to the version before again."""
    from scripts.commands import registry_command

    registry_command.rollback(folder, alias, as_json=json)


@app.command()
def mark(
    folder: Folder,
    version: Version,
    reason: Annotated[str, typer.Option(help="Kept in the log.")],
    descendants: Annotated[
        bool, typer.Option("--descendants", help="Also the versions that were made from it.")
    ] = False,
    json: Json = False,
) -> None:
    """Keep a version from ever being promoted, as when data behind it was withdrawn."""
    from scripts.commands import registry_command

    registry_command.mark(folder, version, reason, descendants=descendants, as_json=json)


@app.command()
def withdraw(
    folder: Folder,
    source: Annotated[Path, typer.Argument(help="A site's signed withdrawal, or a run that was sent some.")],
) -> None:
    """Mark all that was made with the rows of a site that has withdrawn."""
    from scripts.commands import withdraw_command

    withdraw_command.withdraw(folder, source)


@app.command()
def verify(
    folder: Folder,
    key: Annotated[
        list[str] | None, typer.Option(help="Public key that may have signed; any number of them.")
    ] = None,
    head: Annotated[str, typer.Option(help="Digest of a line of the log noted earlier.")] = "",
    json: Json = False,
) -> None:
    """Check the log, every file, signature and alias; exit 1 and name the first that was changed."""
    from scripts.commands import registry_command

    registry_command.verify(folder, key or [], head, as_json=json)


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option(help="mlflow")],
    uri: Annotated[
        str, typer.Option(help="Of MLflow's server or database.", show_default="$MLFLOW_TRACKING_URI")
    ] = "",
    json: Json = False,
) -> None:
    """Copy versions, lineage and aliases to another registry; what is there already stays."""
    from scripts.commands import registry_export_command

    registry_export_command.export(folder, to, uri, as_json=json)
