"""The `fedllm` command. Heavy imports wait until a command needs them: `fedllm --help` answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import fedllm
from scripts import registry_cli, results_cli, site_cli, start_cli
from scripts.cli_options import SITE_KEY, Json, OnBadRow, Words
from scripts.command_line import run_app
from scripts.runtimes.restarts import MOST_RESTARTS
from scripts.terminal import make_output_plain

app = typer.Typer(
    name="fedllm",
    help="Federated fine-tuning of language models: private text stays, LoRA adapters travel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click suggests them itself
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(start_cli.app)
app.add_typer(results_cli.app)
app.add_typer(site_cli.app, name="site")
app.add_typer(registry_cli.app, name="registry")

keys = typer.Typer(help="Keys of sites, nodes and the server.", no_args_is_help=True, suggest_commands=False)
app.add_typer(keys, name="keys")
log = typer.Typer(help="Logs chained by hash.", no_args_is_help=True, suggest_commands=False)
app.add_typer(log, name="log")


def print_version(wanted: bool) -> None:
    """Print the version and end, where `wanted`."""
    if wanted:
        typer.echo(f"fedllm {fedllm.__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every command; `main` reads -v itself, before any command runs."""


@app.command()
def run(
    words: Words = None,
    runtime: Annotated[str, typer.Option(help="local | simulation | deployment")] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Continue after the last complete round.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder that holds run folders.")] = None,
    on_bad_row: OnBadRow = "",
    groups: Annotated[
        int, typer.Option(min=0, help="Groups of clients with an adapter each; 0 = one for all.")
    ] = 0,
    json: Json = False,
) -> None:
    """Fine-tune: the quickstart, a recipe, or any recipe with other values."""
    from scripts.commands import run_command

    if groups:
        run_command.run_in_groups(words or [], groups, runtime=runtime, out=out, as_json=json)
        return
    run_command.run(words or [], runtime=runtime, resume=resume, out=out, on_bad_row=on_bad_row, as_json=json)


@app.command()
def serve(
    words: Words = None,
    credentials: Annotated[Path, typer.Option(help="Folder of the server's certificate.")] = Path(
        "credentials"
    ),
    state: Annotated[Path, typer.Option(help="Folder of Flower's database and logs.")] = Path("server"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the SuperLink, on loopback.")] = 8000,
    monitor: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on loopback of /health and /metrics; 0 = none.")
    ] = 0,
    log: Annotated[str, typer.Option(help="text | json")] = "text",
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Without a new round; then it gives up with code 75.")
    ] = MOST_RESTARTS,
    out: Annotated[Path | None, typer.Option(help="Folder that holds run folders.")] = None,
) -> None:
    """Serve a run to sites elsewhere, and resume it after any kill until it has ended."""
    from scripts.commands import serve_command
    from scripts.runtimes.serving import Place

    place = Place(credentials, state, port, monitor)
    serve_command.serve(words or [], place=place, out=out, most_restarts=max_restarts, log=log)


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(help="A pipeline.toml (docs/pipeline.md).")],
    once: Annotated[bool, typer.Option("--once", help="Look once and do what follows, then end.")] = False,
) -> None:
    """Watch the adapter in use and train it on by itself: triggers, gates, promotion, rollback."""
    from scripts.commands import pipeline_command

    pipeline_command.pipeline(file, once=once)


@app.command()
def check(
    words: Words = None,
    on_bad_row: OnBadRow = "",
    show_all: Annotated[bool, typer.Option("--all", help="Every key with its value too.")] = False,
    json: Json = False,
) -> None:
    """Print the plan of a run without doing it: what was set, what it means, minutes, memory, bytes."""
    from scripts.commands import check_command

    check_command.check(words or [], on_bad_row=on_bad_row, as_json=json, show_all=show_all)


@app.command()
def privacy(
    words: Words = None,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Epsilon of this noise multiplier; 0 = noise for the budget.")
    ] = 0.0,
    rows: Annotated[
        int, typer.Option(min=1, help="Training rows of a client, where one is the unit.")
    ] = 1000,
    json: Json = False,
) -> None:
    """Plan differential privacy: epsilon for a noise, noise for an epsilon, over rounds and cohort sizes."""
    from scripts.commands import privacy_command

    privacy_command.privacy(words or [], noise=noise, rows=rows, as_json=json)


@app.command()
def doctor(
    site: Annotated[
        bool, typer.Option("--site", help="What this machine permits, and every field that will leave it.")
    ] = False,
) -> None:
    """Check this machine: versions, device, disk, model, Flower. Every problem comes with its cure."""
    from scripts.commands import doctor_command, doctor_site

    doctor_site.doctor_site() if site else doctor_command.doctor()


@keys.command("new")
def new_key(
    path: Annotated[Path, typer.Argument(help="The file to make.")] = SITE_KEY,
) -> None:
    """Make the key by which this site proves who it is, and print the line for the server's list of sites."""
    from scripts.commands import keys_command

    keys_command.new(path)


@keys.command("show")
def show_key(
    path: Annotated[Path, typer.Argument(help="A file that `fedllm keys new` made.")] = SITE_KEY,
) -> None:
    """Print the public half of a key, as other machines write it down."""
    from scripts.commands import keys_command

    keys_command.show(path)


@keys.command("server")
def server_keys(
    folder: Annotated[Path, typer.Argument(help="Where they go; an authority in it signs again.")],
    names: Annotated[
        list[str], typer.Argument(help="DNS names or addresses by which sites reach the server.")
    ],
) -> None:
    """Make the server's TLS certificate, the authority that signs it, and its SuperExec secret."""
    from scripts.commands import credentials_command

    credentials_command.server(folder, names)


@keys.command("node")
def node_key(
    path: Annotated[Path, typer.Argument(help="The file to make; PATH.pub goes to the server.")],
) -> None:
    """Make the key by which a SuperNode proves itself to the SuperLink."""
    from scripts.commands import credentials_command

    credentials_command.node(path)


@keys.command("admit")
def admit_node(
    public: Annotated[Path, typer.Argument(help="A node's .pub file.")],
    credentials: Annotated[Path, typer.Option(help="The server's folder of `fedllm keys server`.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the SuperLink, on loopback.")] = 8000,
) -> None:
    """Admit a SuperNode's key at the SuperLink of this machine."""
    from scripts.commands import credentials_command

    credentials_command.admit(public, credentials=credentials, port=port)


@log.command("verify")
def verify_log(
    path: Annotated[Path, typer.Argument(help="A log, a run folder, or a site's state folder.")],
    head: Annotated[str, typer.Option(help="Digest of a line noted earlier: it must still be there.")] = "",
    json: Json = False,
) -> None:
    """Check a log from its first line to its last; exit 1 and name the first line that was changed."""
    from scripts.commands import log_command

    log_command.verify_log(path, head=head, as_json=json)


def main() -> None:
    """Run the command; an expected failure is one line on stderr and exit code 2."""
    make_output_plain()
    verbose = {"-v", "--verbose"} & set(sys.argv[1:])
    arguments = [word for word in sys.argv[1:] if word not in {"-v", "--verbose"}]
    sys.exit(run_app(app, arguments, name="fedllm", verbose=bool(verbose)))
