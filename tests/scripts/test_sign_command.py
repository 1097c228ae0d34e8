"""`fedllm sign`, `fedllm verify` and `fedllm keys show`, as they are typed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.adapters.folder import WEIGHTS, save_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.config.keys import LoraConfig
from fedllm.identity import new_key, public_text
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.files import content_digest
from fedllm.signing.statement import AdapterStatement, sign_adapter
from scripts.cli import app
from scripts.command_line import run_app


def typed(*words: object) -> int:
    return run_app(app, [*map(str, words)], name="fedllm")


@pytest.fixture
def base(load_tiny: Callable[..., BaseModel]) -> BaseModel:
    return load_tiny("llama")


@pytest.fixture
def adapter(base: BaseModel, tmp_path: Path) -> Path:
    """Return an adapter without its run."""
    layout = layout_of(base.model, LoraConfig(rank=1), base.fingerprint)
    names = {"base_model": "org/base", "revision": "v1", "target_modules": ["q_proj"], "card": "# A card\n"}
    save_adapter(tmp_path / "letters", initial_adapter(layout, 0), **names)  # type: ignore[arg-type]
    return tmp_path / "letters"


def test_what_is_signed_is_verified_until_it_changes(
    adapter: Path, base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("keys", "new", tmp_path / "key") == 0
    capsys.readouterr()
    assert typed("keys", "show", tmp_path / "key") == 0
    public = capsys.readouterr().out.strip()
    words = ("--base", base.files.folder, "--version", 3, "--json")
    assert typed("sign", adapter, "--key", tmp_path / "key", *words) == 0
    signed = json.loads(capsys.readouterr().out)
    assert typed("verify", adapter, "--key", public, "--json") == 0
    assert json.loads(capsys.readouterr().out) == signed
    statement = signed["statement"]
    assert (statement["name"], statement["version"], signed["signer"]) == ("letters", 3, public)
    digest = content_digest(base.files.folder)
    assert statement["base"] == {"name": "org/base", "revision": "v1", "digest": digest}
    assert typed("verify", adapter, "--key", public) == 0
    assert "letters, version 3" in capsys.readouterr().out

    with (adapter / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    assert typed("verify", adapter, "--key", public) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{WEIGHTS}: changed" in line


def test_a_statement_that_leaves_all_open_is_shown(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = new_key(tmp_path / "key")
    sign_adapter(adapter, AdapterStatement(name="letters"), key)
    assert typed("verify", adapter, "--key", public_text(key)) == 0
    assert "adapter: letters" in capsys.readouterr().out


def test_nobody_signs_what_was_not_trained_on_the_base(
    adapter: Path,
    make_model_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed("keys", "new", tmp_path / "key")
    assert typed("sign", adapter, "--key", tmp_path / "key", "--base", make_model_folder("gpt2")) == 2
    assert "trained on another base model" in capsys.readouterr().err


def test_a_check_by_no_key_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("verify", adapter) == 2
    assert "whose signature?" in capsys.readouterr().err
    assert typed("verify", adapter, "--key", "anna") == 2
    assert "expected a public key" in capsys.readouterr().err
