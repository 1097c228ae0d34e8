"""What the command lines of this project share: how one runs, and how a module becomes one."""

import inspect
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from fedllm.errors import FedLLMError

Quick = Annotated[bool, typer.Option("--quick", help="A small part, in under 3 minutes on two cores.")]
Seed = Annotated[int, typer.Option(help="Of the rows and the starts.")]
Json = Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")]
Output = Annotated[Path | None, typer.Option(help="Also keep the JSON object in this file.")]


INTERRUPTED = 128 + signal.SIGINT  # how typer reports Ctrl-C


class StoppedError(FedLLMError):
    """A signal stopped the command; the message says what is kept and how to go on."""


def run_app(app: typer.Typer, words: Sequence[str], *, name: str, verbose: bool = False) -> int:
    """Run a command line and return its exit code; an error that a person can mend is one line and code 2.

    SIGTERM and SIGHUP do what Ctrl-C does; the codes are 143, 129 and 130. Under nohup SIGHUP does nothing.
    """
    stopped_by = int(signal.SIGINT)

    def stop(number: int, frame: object) -> None:
        nonlocal stopped_by
        stopped_by = number
        raise KeyboardInterrupt

    signs = [signal.SIGTERM]  # a supervisor's way to say Ctrl-C
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal's that is closed
        signs.append(signal.SIGHUP)
    before = {sign: signal.signal(sign, stop) for sign in signs}
    try:
        code: int = app(list(words), prog_name=name, standalone_mode=False) or 0
        if code == INTERRUPTED:
            print("fedllm: stopped", file=sys.stderr)
    except StoppedError as error:
        print(f"fedllm: {error}", file=sys.stderr)
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FedLLMError as error:
        if verbose:
            raise
        print(f"fedllm: {error}", file=sys.stderr)
        return 2
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    return 128 + stopped_by if code == INTERRUPTED else code


def again(*more: str) -> str:
    """Return the command line that was typed, with further words."""
    program = ["fedllm"] if shutil.which("fedllm") else [sys.argv[0]]
    spec = sys.modules["__main__"].__spec__
    if Path(sys.argv[0]).name == "__main__.py" and spec is not None:
        program = ["python", "-m", spec.parent or "fedllm"]
    return shlex.join([*program, *(word for word in sys.argv[1:] if word not in more), *more])


def command_of(work: Callable[[Any], None]) -> Callable[..., None]:
    """Return a command whose options are the fields of the dataclass that `work` takes.

    A field such as `seed: Annotated[int, typer.Option(help=...)] = 0` becomes `--seed`. So a module lists its
    options once, and Python calls it with the same value that the command line makes.
    """
    (parameter,) = inspect.signature(work).parameters.values()
    options = parameter.annotation

    def command(**given: Any) -> None:
        work(options(**given))

    command.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]  # what typer reads
    return command


def run_module(package: str, modules: Mapping[str, str], words: Sequence[str]) -> int:
    """Run the module of `package` that the first word names, and return the exit code.

    `modules` holds a line of help by name. The `main` of a module takes its options as a dataclass. Only
    the module that is asked for is imported.
    """
    app = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, suggest_commands=False
    )
    for name, line in modules.items():
        if words[:1] == [name]:
            module = import_module(f"{package}.{name}")
            if hasattr(module, "__path__"):  # a folder keeps its command in main.py
                module = import_module(f"{package}.{name}.main")
            app.command(name, help=line)(command_of(module.main))
        else:
            app.command(name, help=line)(lambda: None)
    return run_app(app, words, name=f"python -m {package}")
