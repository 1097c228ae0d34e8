"""The `fedllm` commands about results: study, and what a run left, from evaluate to chat."""

from pathlib import Path
from typing import Annotated

import typer

from scripts.cli_options import (
    AUDIT_EPOCHS,
    AUDIT_PREFIX,
    AUDIT_ROWS,
    AUDIT_SUFFIX,
    SITE_KEY,
    Base,
    Json,
    Words,
)

app = typer.Typer(suggest_commands=False)


@app.command()
def evaluate(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="Run folders, adapter folders, base models.")
    ],
    data: Annotated[str, typer.Option(help="Rows to evaluate on instead of the run's held-out ones.")] = "",
    tasks: Annotated[str, typer.Option(help="Files, folders, hub ids of tasks, between commas.")] = "",
    suite: Annotated[str, typer.Option(help="general | keyboard | medical: from the hub, or --tasks.")] = "",
    split: Annotated[str, typer.Option(help="Of hub data sets that --tasks names.")] = "test",
    limit: Annotated[int | None, typer.Option(min=2, help="Rows of each task at most, spread out.")] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every client's rows under every adapter, own ones too.")
    ] = False,
    flowertune: Annotated[
        bool, typer.Option("--flowertune", help="FlowerTune's rule for choices too, for comparison only.")
    ] = False,
    harness: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, which runs them.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer to be exactly right.")] = 256,
    json: Json = False,
) -> None:
    """Loss of each client, base against adapter, and answers; or tasks, with chance and intervals."""
    from scripts.commands import evaluate_command

    wanted = evaluate_command.Wanted(
        data=data,
        tasks=tasks,
        suite=suite,
        split=split,
        limit=limit,
        matrix=matrix,
        harness=harness,
        flowertune=flowertune,
        max_new_tokens=max_new_tokens,
    )
    evaluate_command.evaluate(targets, wanted, as_json=json)


@app.command()
def study(
    words: Words = None,
    methods: Annotated[str, typer.Option(help="Some of them, with commas; all that the recipe has.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="From the recipe's seed on.")] = 3,
    rates: Annotated[
        str,
        typer.Option(help="Learning rates that each method may take; a third to three times the recipe's."),
    ] = "",
    jobs: Annotated[int, typer.Option(min=0, help="Cells at once; 0 = by cores and memory.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; studies/NAME.")] = None,
    json: Json = False,
) -> None:
    """What joining brings to each client: alone, federated, at home and pooled, at equal tokens."""
    from scripts.commands import study_command

    study_command.study(
        words or [], methods=methods, seeds=seeds, rates=rates, jobs=jobs, out=out, as_json=json
    )


@app.command()
def adapt(
    target: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    data: Annotated[str, typer.Option(help="Your own rows, in place of those of the run's clients.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the adapters; of a run private/adapted, else adapted.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="At most; the rows held out say how many.")] = 80,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of AdamW; that of the run, 0.001 without one.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a shared adapter on with private rows, and say what joining brought next to training alone."""
    from scripts.commands import adapt_command

    adapt_command.adapt(target, data=data, out=out, steps=steps, learning_rate=learning_rate, as_json=json)


@app.command()
def audit(
    target: Annotated[Path, typer.Argument(help="A run folder, on the machine that has its clients' rows.")],
    rows: Annotated[
        int, typer.Option(min=1, help="Rows of training and of held-out text at most.")
    ] = AUDIT_ROWS,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens given, in the extraction test.")] = AUDIT_PREFIX,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens to be given back.")] = AUDIT_SUFFIX,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes of the positive control over its rows.")
    ] = AUDIT_EPOCHS,
    plot: Annotated[Path | None, typer.Option(help="Draw the result: a .png, .svg or .pdf file.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Put what it repeats on the adapter's card.")] = False,
    json: Json = False,
) -> None:
    """Attack a finished run where its rows are, with controls: membership, extraction, canaries."""
    from scripts.commands import audit_command

    audit_command.audit(
        target,
        rows=rows,
        prefix=prefix,
        suffix=suffix,
        epochs=epochs,
        plot=plot,
        on_card=card,
        as_json=json,
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
def unlearn(
    run: Annotated[Path, typer.Argument(help="A run folder, on the machine of its server.")],
    client: Annotated[str, typer.Option(help="Who is to be forgotten.")] = "",
    rows: Annotated[Path | None, typer.Option(help="A file of rows to forget, whoever has them.")] = None,
    rows_gone: Annotated[
        bool, typer.Option("--rows-gone", help="The client stays; its site has forgotten rows of it.")
    ] = False,
    name: Annotated[str, typer.Option(help="Of the new run; RUN-unlearned.")] = "",
    runtime: Annotated[str, typer.Option(help="local | simulation | deployment")] = "local",
    method: Annotated[str, typer.Option(help="Where no class is exact: ascent | subtraction")] = "ascent",
    verify: Annotated[
        int, typer.Option(min=0, help="Seeds with which an approximation is compared with retraining.")
    ] = 0,
    is_only_told: Annotated[bool, typer.Option("--dry-run", help="Only say what could be promised.")] = False,
    is_prepared: Annotated[
        bool, typer.Option("--prepare", help="Leave the rounds to fedllm serve, with sites elsewhere.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a run forget a client or rows, as surely as it allows, and say how sure that is."""
    from scripts.commands import unlearn_command

    wanted = unlearn_command.Wanted(
        run,
        name or f"{run.resolve().name}-unlearned",
        runtime=runtime,
        method=method,
        num_seeds=verify,
        is_prepared=is_prepared,
    )
    unlearn_command.unlearn(
        wanted, client=client, rows=rows, rows_gone=rows_gone, is_only_told=is_only_told, as_json=json
    )


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
def export(
    target: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    merge: Annotated[Path | None, typer.Option(help="A model folder, as transformers loads it.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="A file for llama.cpp, Ollama, LM Studio.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto | float32 | bfloat16 | float16 | q8_0 (GGUF alone)")
    ] = "auto",
    base: Base = "",
    shard: Annotated[str, typer.Option(help="Largest weight file of --merge.")] = "5GB",
    json: Json = False,
) -> None:
    """Merge an adapter into its base model: a folder that needs no PEFT, or one GGUF file."""
    from scripts.commands import export_command

    export_command.export(target, merge=merge, gguf=gguf, dtype=dtype, base=base, shard=shard, as_json=json)


@app.command()
def sign(
    target: Annotated[Path, typer.Argument(help="A finished run, or an adapter folder.")],
    key: Annotated[Path, typer.Option(help="A file that `fedllm keys new` made.")] = SITE_KEY,
    name: Annotated[str, typer.Option(help="Of the adapter; else the run's or the folder's.")] = "",
    version: Annotated[int, typer.Option(min=0, help="Of the adapter of that name; 0 = none.")] = 0,
    base: Base = "",
    json: Json = False,
) -> None:
    """Sign an adapter with how it came about: base model, code, clients, privacy, parents."""
    from scripts.commands import sign_command

    sign_command.sign(target, key=key, name=name, version=version, base=base, as_json=json)


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(help="A run or an adapter folder.")],
    key: Annotated[
        list[str] | None,
        typer.Option(
            help="A public key that may have signed it.", show_default="[adapters] signers of site.toml"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check the signature and every file of an adapter, and print what the signer says of it."""
    from scripts.commands import sign_command

    sign_command.verify(target, keys=key or [], as_json=json)


@app.command()
def push(
    target: Annotated[Path, typer.Argument(help="A run, an adapter folder, or a merged model.")],
    repo: Annotated[str, typer.Argument(help="Of the Hugging Face hub: NAME, or OWNER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private", help="Only you and whom you let may read it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Publish an adapter or a merged model on the hub; shows every file first, and sends nothing private."""
    from scripts.commands import push_command

    push_command.push(target, repo, private=private, yes=yes, as_json=json)


@app.command()
def chat(
    target: Annotated[str, typer.Argument(help="A run, an adapter folder, or a model.")],
    base: Base = "",
    form: Annotated[
        str, typer.Option("--as", help="auto | chat | text: answer a line, or continue it")
    ] = "auto",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = always the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 200,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda[:N]")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the draws, at a temperature above 0.")] = 0,
) -> None:
    """Talk to base model and adapter side by side; piped lines are answered one by one."""
    from scripts.commands import chat_command

    chat_command.chat(
        target,
        base=base,
        form=form,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        device=device,
        seed=seed,
    )


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="A run folder, on the machine of its server.")],
    metrics: Annotated[
        Path | None, typer.Option(help="Keep its figures in this file too, as OpenMetrics.")
    ] = None,
    json: Json = False,
) -> None:
    """Follow a run of another terminal until it ends; exit 0 if it completed, else 1. It is not disturbed."""
    from scripts.commands import watch_command

    watch_command.watch(folder, metrics=metrics, as_json=json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder or a study folder.")],
    other: Annotated[Path | None, typer.Argument(help="Another run, to compare with.")] = None,
    is_opened: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """Write report.html: curves, losses by data holder, answers, costs, privacy; needs only a browser."""
    from scripts.commands import report_command

    report_command.report(folder, other, is_opened=is_opened)
