"""The `fedllm` command. Heavy imports wait until a command needs them: `fedllm --help` answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import fedllm
from scripts import site_cli
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
app.add_typer(site_cli.app, name="site")

keys = typer.Typer(help="Keys of sites, nodes and the server.", no_args_is_help=True, suggest_commands=False)
app.add_typer(keys, name="keys")
log = typer.Typer(help="Logs chained by hash.", no_args_is_help=True, suggest_commands=False)
app.add_typer(log, name="log")

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE.toml] [key=value ...]", help="A recipe (none = quickstart) and overrides."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
OnBadRow = Annotated[str, typer.Option("--on-bad-row", help="skip | stop", show_default="skip")]


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
    json: Json = False,
) -> None:
    """Fine-tune: the quickstart, a recipe, or any recipe with other values."""
    from scripts.commands import run_command

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
def evaluate(
    target: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    data: Annotated[str, typer.Option(help="Rows to evaluate on instead of the run's held-out ones.")] = "",
    json: Json = False,
) -> None:
    """Held-out loss and perplexity of base and adapter for every client, and answers before and after."""
    from scripts.commands import evaluate_command

    evaluate_command.evaluate(target, data=data, as_json=json)


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
def audit(
    target: Annotated[Path, typer.Argument(help="A run folder, on the machine that has its clients' rows.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of training and of held-out text at most.")] = 500,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens given, in the extraction test.")] = 50,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens to be given back.")] = 50,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of the positive control over its rows.")] = 12,
    plot: Annotated[Path | None, typer.Option(help="Draw the result: a .png, .svg or .pdf file.")] = None,
    json: Json = False,
) -> None:
    """Attack a finished run where its rows are, with controls: membership, extraction, canaries."""
    from scripts.commands import audit_command

    audit_command.audit(
        target, rows=rows, prefix=prefix, suffix=suffix, epochs=epochs, plot=plot, as_json=json
    )


@app.command()
def distil(
    teacher: Annotated[str, typer.Argument(help="A base model, or an adapter folder or run folder on one.")],
    student: Annotated[str, typer.Option(help="A smaller model, or layers=N: cut from the teacher.")],
    text: Annotated[str, typer.Option(help="What it learns on: a source, as data.source takes.")],
    out: Annotated[Path, typer.Option(help="The folder that is written.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of a step.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Likeliest tokens kept of the teacher.")] = 64,
    on_policy: Annotated[int, typer.Option(min=0, help="Rounds on the student's own texts, after.")] = 0,
    rank: Annotated[int, typer.Option(min=1, help="Of the student's LoRA adapter.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of a text.")] = 256,
    num_texts: Annotated[int, typer.Option(min=4, help="To learn on, at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the texts' order and the adapter.")] = 0,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda[:N]")] = "auto",
    json: Json = False,
) -> None:
    """Teach a smaller model what a large one says: the same tokenizer, another, or cut from its layers."""
    from scripts.commands import distil_command
    from scripts.students import Numbers

    numbers = Numbers(
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        top_k=top_k,
        on_policy=on_policy,
        rank=rank,
        max_tokens=max_tokens,
        num_texts=num_texts,
        seed=seed,
        device=device,
    )
    distil_command.distil(teacher, student=student, text=text, out=out, numbers=numbers, as_json=json)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run folder.")],
    second: Annotated[Path, typer.Argument(help="Another run folder.")],
    assert_equal: Annotated[
        bool, typer.Option("--assert-equal", help="Exit 1 unless the adapters are equal bit for bit.")
    ] = False,
    json: Json = False,
) -> None:
    """Show how two runs differ: configuration, losses, adapter."""
    from scripts.commands import compare_command

    compare_command.compare(first, second, assert_equal=assert_equal, as_json=json)


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
    path: Annotated[Path, typer.Argument(help="The file to make.")] = Path("~/.config/fedllm/site.key"),
) -> None:
    """Make the key by which this site proves who it is, and print the line for the server's list of sites."""
    from scripts.commands import keys_command

    keys_command.new(path)


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
