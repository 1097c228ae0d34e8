"""`fedllm export`: what it writes gives the adapter's own losses, loaded by others."""

import json
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm.adapters.folder import save_adapter
from fedllm.adapters.layout import AdapterState
from fedllm.adapters.peft_reading import names_for_peft
from fedllm.engine.jobs import EvaluationJob
from fedllm.files import verify_manifest
from fedllm.models.base import BaseModel
from fedllm.models.chat import Encoded
from scripts import cli
from tests.builders import engine_on, random_texts

CARD = """---
base_model: tiny
library_name: peft
license: apache-2.0
---

# An adapter

```python
from peft import PeftModel
```

## How it was trained

By three data holders.
"""


@pytest.fixture
def publish(load_tiny: Callable[..., BaseModel], tmp_path: Path) -> Callable[..., tuple[Path, float]]:
    """Return a function (kind, private) -> the folder of an adapter of random numbers, and its loss."""

    def do(kind: str = "llama", private: bool = False) -> tuple[Path, float]:
        base = load_tiny(kind)
        engine = engine_on(base, rank=4)
        draw = torch.Generator().manual_seed(0)
        state = AdapterState(engine.layout, torch.randn(engine.layout.size, generator=draw) * 0.2)
        modules = [matrix.module for matrix in engine.layout.matrices]
        save_adapter(
            tmp_path / "adapter",
            state,
            base_model=base.files.public_name,
            revision="",
            target_modules=names_for_peft(base.model, modules) or modules,
            card=CARD,
            is_public=not private,
        )
        rows = [Encoded(text, text) for text in random_texts([9, 14])]
        (done,) = engine.evaluate([EvaluationJob("one", state.vector, rows)])
        return tmp_path / "adapter", done.loss

    return do


def loss_of(model: Any) -> float:
    """Return the mean loss of the same texts under a model of transformers."""
    total, number = 0.0, 0
    with torch.no_grad():
        for text in random_texts([9, 14]):
            tokens = torch.tensor([text])
            total += float(model(input_ids=tokens, labels=tokens).loss) * (len(text) - 1)
            number += len(text) - 1
    return total / number


def fedllm(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedllm", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_folder_gives_the_adapters_losses(
    kind: str, publish: Callable, make_model_folder: Callable, tmp_path: Path, monkeypatch: Any
) -> None:
    adapter, loss = publish(kind)
    merged, base = tmp_path / "merged", make_model_folder(kind)
    assert fedllm(monkeypatch, "export", adapter, "--merge", merged, "--base", base, "--shard", "60KB") == 0
    read = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert loss_of(read) == pytest.approx(loss, abs=1e-5)
    assert AutoTokenizer.from_pretrained(merged)("Open")["input_ids"]
    assert len(list(merged.glob("*.safetensors"))) > 1
    verify_manifest(merged)
    assert stat.S_IMODE(merged.stat().st_mode) == 0o755
    texts = [file.read_text() for file in merged.iterdir() if file.suffix in {".json", ".md", ".jinja"}]
    assert not any(str(base) in text for text in texts)


def test_the_code_on_page_and_card_loads_without_a_network(
    publish: Callable, make_model_folder: Callable, tmp_path: Path, monkeypatch: Any
) -> None:
    adapter, loss = publish()
    words = ["export", adapter, "--merge", tmp_path / "merged", "--base", make_model_folder()]
    assert fedllm(monkeypatch, *words) == 0
    card = (tmp_path / "merged" / "README.md").read_text().replace("path/to/this/folder", "merged")
    page = (Path(__file__).parents[2] / "docs" / "handover.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *unused: pytest.fail("it asked the network"))
    for text in (card, page):
        loaded: dict[str, Any] = {}
        exec(text.partition("```python\n")[2].partition("```")[0], loaded)
        assert loss_of(loaded["model"].float()) == pytest.approx(loss, abs=1e-5)
        assert loaded["tokenizer"]("Open")["input_ids"]


def test_a_gguf_file_gives_the_adapters_losses(
    publish: Callable, make_model_folder: Callable, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    adapter, loss = publish()
    for form, most in (("float32", 1e-5), ("auto", 1e-3), ("q8_0", 0.02)):
        file = tmp_path / f"{form}.gguf"
        words = ["export", adapter, "--gguf", file, "--base", make_model_folder(), "--dtype", form, "--json"]
        assert fedllm(monkeypatch, *words) == 0
        (written,) = json.loads(capsys.readouterr().out)["written"]
        assert written["bytes"] == file.stat().st_size
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        assert loss_of(read) == pytest.approx(loss, abs=most), form


def test_weights_that_cannot_be_written_are_one_line(
    publish: Callable, make_model_folder: Callable, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    adapter, _ = publish()

    def full(*unused: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    words = ["export", adapter, "--merge", tmp_path / "merged", "--base", make_model_folder()]
    assert fedllm(monkeypatch, *words) == 2
    told = capsys.readouterr().err.strip()
    assert "No space left" in told
    assert "\n" not in told
    assert not (tmp_path / "merged").exists()


def test_the_card_of_a_merged_model_keeps_the_adapters(
    publish: Callable, make_model_folder: Callable, tmp_path: Path, monkeypatch: Any
) -> None:
    adapter, _ = publish(private=True)
    words = [
        "export",
        adapter,
        "--merge",
        tmp_path / "m",
        "--base",
        make_model_folder(),
        "--dtype",
        "bfloat16",
    ]
    assert fedllm(monkeypatch, *words) == 0
    card = (tmp_path / "m" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "library_name: transformers" in card
    assert "By three data holders." in card
    assert "PeftModel" not in card
    assert "is private" in card
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o700


def test_a_wrong_wish_is_one_line_and_writes_nothing(
    publish: Callable, make_model_folder: Callable, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    adapter, _ = publish("gpt2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    base, before = ["--base", make_model_folder("gpt2")], set(tmp_path.iterdir())
    for words, told in (
        ([], "--merge FOLDER, --gguf FILE"),
        (["--merge", tmp_path / "full"], "holds something already"),
        (["--merge", tmp_path / "new", "--dtype", "q8_0"], "--dtype q8_0: --merge takes"),
        (["--gguf", tmp_path / "new.gguf", *base], "no GGUF file of a model of type gpt2"),
        (["--merge", tmp_path / "adapter" / "README.md" / "m", *base], "cannot write"),
    ):
        assert fedllm(monkeypatch, "export", adapter, *words) == 2
        told_by = capsys.readouterr().err.strip()
        assert told in told_by
        assert "\n" not in told_by
    assert set(tmp_path.iterdir()) == before
