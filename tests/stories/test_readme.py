"""The README's Python example runs as it stands there, on a tiny model."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs(
    make_model_folder: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"text": f"Return the list {n}.", "client": f"client-{n % 4}"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.toml").write_text(
        f'model.name = "{make_model_folder("llama")}"\n'
        'data.source = "rows.jsonl"\nfederation.num-rounds = 1\n'
    )
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert '"quickstart"' in block
    exec(block.replace("quickstart", "tiny.toml"), {})
    told = capsys.readouterr().out
    assert "'adapter': {'client-0': " in told
    assert str(tmp_path / "runs" / "four" / "adapter") in told.replace("\n", "")
