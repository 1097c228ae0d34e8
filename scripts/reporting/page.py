"""Writes pages, `report.html` of a run or a study and that of two runs, and the curves of a run as a file."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2

from fedllm.errors import CheckpointError, ConfigError, FedLLMError
from fedllm.files import write_bytes
from fedllm.runs.folder import ROUNDS
from scripts.reporting.compared_page import compared_page
from scripts.reporting.figures import STYLE, standalone
from scripts.reporting.parts import Page
from scripts.reporting.run_files import read_run
from scripts.reporting.run_page import loss_chart, run_page
from scripts.reporting.study_page import study_page

REPORT, STUDY = "report.html", "study.json"


def write_report(folder: Path, other: Path | None = None) -> Path:
    """Write the page of a run or a study into its folder, or that of two runs into the first's; return it.

    Raises:
        ConfigError: there is neither a run with a round nor a study.
        CheckpointError: the page cannot be written.
    """
    try:
        if other is not None:
            page = compared_page(read_run(folder), read_run(other))
            return _write(folder / f"report-{other.resolve().name}.html", render(page))
        if (folder / STUDY).is_file():
            return _write(folder / REPORT, render(study_page(json.loads((folder / STUDY).read_text()))))
        return _write(folder / REPORT, render(run_page(read_run(folder))))
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # of a changed file
        places = folder if other is None else f"{folder} or {other}"
        raise ConfigError(f"{places}: damaged, or of another version of fedllm ({error!r})") from None


def plot_losses(folder: Path, path: Path) -> Path:
    """Draw the clients' losses over the rounds of a run into an .svg file and return it.

    Raises:
        ConfigError: the folder is no run's, or the file has another ending.
        CheckpointError: the file cannot be written.
    """
    if path.suffix != ".svg":
        raise ConfigError(f"{path}: a plot of a run is an .svg file")
    return _write(path, standalone(loss_chart(read_run(folder)).wide))


@contextmanager
def reported(folder: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Write the page of a run when the block has ended, well or not; without one the run is as good."""
    try:
        yield
    finally:
        if (folder / ROUNDS).is_file():
            try:
                write_report(folder)
            except FedLLMError as error:
                notice(f"no {REPORT}: {error}")


def render(page: Page) -> str:
    """Return a page as HTML; names and answers in it may be anybody's, so all of them are escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.jinja").render(page=page, style=STYLE)


def _write(target: Path, text: str) -> Path:
    try:
        write_bytes(target, text.encode(errors="replace"))  # a text may hold half of a letter
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror}") from None
    return target
