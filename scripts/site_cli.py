"""`fedllm site`: what the owner of a data holder's machine runs there."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="On a data holder's machine: what its owner runs.", no_args_is_help=True, suggest_commands=False
)
SiteFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="The site's file.", show_default="$FEDLLM_SITE, else ~/.config/fedllm/site.toml"
    ),
]


@app.callback()
def site_options() -> None:
    """Keep `fedllm site` a group of commands, however few it has."""


@app.command()
def budget(
    config: SiteFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what all runs have spent of each data set's privacy budget, and what is left."""
    from scripts.commands import site_budget_command

    site_budget_command.budget(config, as_json=json)


@app.command()
def start(config: SiteFile = None) -> None:
    """Take part: run this site's service and nodes until Ctrl-C, and start again what dies."""
    from scripts.commands import site_command

    site_command.start(config)


@app.command()
def withdraw(
    node: Annotated[str, typer.Argument(help="One of [nodes.NAME].", show_default="the whole site")] = "",
    reason: Annotated[str, typer.Option(help="For the site's own log; it leaves to nobody.")] = "",
    out: Annotated[Path, typer.Option(help="The signed record, for servers.")] = Path("withdrawal.json"),
    config: SiteFile = None,
) -> None:
    """Withdraw: answer no server any more, and prove it to those that used these rows."""
    from scripts.commands import site_withdraw_command

    site_withdraw_command.withdraw_site(config, node=node, reason=reason, out=out)


@app.command()
def forget(
    rows: Annotated[Path, typer.Argument(help="A file of rows that were taken back.")],
    columns: Annotated[str, typer.Option(help="data.columns of the runs that read them.")] = "",
    config: SiteFile = None,
) -> None:
    """Let no run read some rows on this machine any more; only salted hashes of them are kept."""
    from scripts.commands import site_forget_command

    site_forget_command.forget(rows, columns=columns, file=config)


@app.command()
def bundle() -> None:
    """Print the SHA-256 of the code that a server of this release ships, for [allow] bundles."""
    from scripts.commands import site_bundle_command

    site_bundle_command.bundle()
