import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def model_copy(make_model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a tiny model folder that the test may damage."""
    return Path(shutil.copytree(make_model_folder(), tmp_path / "copy"))


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Return a function (file, **values) that replaces top-level values of a JSON file."""

    def edit(file: Path, **values: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit
