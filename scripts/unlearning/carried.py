"""What a run that unlearns takes along of the run before, besides its state."""

import shutil
from pathlib import Path

from clients.canaries import canary_file
from clients.forgotten import FORGOTTEN
from fedllm.files import make_private_folder


def carry_private(run: Path, old_name: str, folder: Path, new_name: str) -> None:
    """Copy what decides on the rows of the clients here: the secret of their canaries, rows forgotten before.

    Without the former the others would train on other canaries, and an audit would look for other ones.

    Raises:
        OSError: it cannot be copied.
    """
    before, after = run / "private", folder / "private"
    canaries = canary_file(before, old_name), canary_file(after, new_name)
    for old, new in (canaries, (before / FORGOTTEN, after / FORGOTTEN)):
        if old.exists() and not new.exists():
            make_private_folder(after)
            shutil.copy2(old, new)
