"""`fedllm report`: a page that shows what a run, two runs or a study found."""

import webbrowser
from pathlib import Path

from scripts.console import Console, shown_path
from scripts.reporting.page import write_report


def report(folder: Path, other: Path | None, *, is_opened: bool) -> None:
    """Write the page, say where it is and, where wanted, open it in the browser.

    Raises:
        FedLLMError: the folder holds nothing to show, or the page cannot be written.
    """
    page = write_report(folder, other)
    Console().line(shown_path(page.resolve()))
    if is_opened:
        webbrowser.open(page.resolve().as_uri())
