"""A machine whose policy names signers loads what they have signed, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.adapters.folder import load_adapter, replace_card, save_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError, IntegrityError, PolicyError
from fedllm.files import SIGNATURE
from fedllm.identity import new_key, public_text
from fedllm.runs.folder import to_toml
from fedllm.signing.statement import AdapterStatement, sign_adapter
from fedllm.site_policy import load_policy
from scripts.commands.adapt_command import adapt
from scripts.commands.chat_command import open_voices
from scripts.commands.compare_command import differences
from scripts.commands.distil_command import open_teacher
from scripts.commands.export_command import export
from scripts.commands.push_command import publishable
from scripts.console import Console
from scripts.evaluation.columns import open_columns
from tests.builders import small_layout

READERS: dict[str, Callable[[Path], object]] = {
    "python": load_adapter,
    "evaluate": lambda folder: open_columns([str(folder)]),
    "chat": lambda folder: open_voices(str(folder), "", "cpu", Console(quiet=True)),
    "export": lambda folder: export(
        folder, merge=folder / "new", gguf=None, dtype="auto", base="", shard="5GB", as_json=True
    ),
    "push": publishable,
    "adapt": lambda folder: adapt(
        folder, data="rows.jsonl", out=None, steps=1, learning_rate=None, as_json=True
    ),
    "compare": lambda folder: differences(folder.parent, folder.parent),
    "distil": lambda folder: open_teacher(str(folder), "cpu"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the adapter folder of a run, unsigned."""
    (tmp_path / "config.toml").write_text(to_toml(RunConfig()))
    names = {"base_model": "org/base", "revision": "", "target_modules": ["a", "c"], "card": "# A card\n"}
    save_adapter(tmp_path / "adapter", initial_adapter(small_layout(), 0), **names)  # type: ignore[arg-type]
    return tmp_path / "adapter"


@pytest.fixture
def policy(tmp_path: Path, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Take adapters that `key` has signed, of `ward` from version 7 on."""
    file = tmp_path / "site.toml"
    file.write_text(f'[adapters]\nsigners = ["{public_text(key)}"]\nmin-versions = {{ ward = 7 }}\n')
    monkeypatch.setenv("FEDLLM_SITE", str(file))
    return file


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_an_unsigned_adapter(reader: str, folder: Path, policy: Path) -> None:
    with pytest.raises(
        PolicyError, match=r"adapter: not signed, as \[adapters\] signers of .*site.toml asks"
    ):
        READERS[reader](folder)


def test_a_run_that_is_not_finished_is_refused(folder: Path, policy: Path) -> None:
    (folder.parent / "checkpoints" / "round-00001").mkdir(parents=True)
    with pytest.raises(PolicyError, match="not finished, so not signed"):
        open_columns([str(folder.parent)])


@pytest.mark.parametrize(("version", "is_loaded"), [(7, True), (8, True), (6, False), (0, False)])
def test_an_older_version_is_not_loaded_again(
    version: int, is_loaded: bool, folder: Path, policy: Path, key: Ed25519PrivateKey
) -> None:
    sign_adapter(folder, AdapterStatement(name="ward", version=version), key)
    if is_loaded:
        assert load_adapter(folder).base_model == "org/base"
        assert SIGNATURE in [file.name for file in publishable(folder)[1]]
    else:
        with pytest.raises(PolicyError, match=f"version {version} of ward, and .* asks for 7 or later"):
            load_adapter(folder)


def test_neither_another_key_nor_another_card_is_loaded(
    folder: Path, policy: Path, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    sign_adapter(folder, AdapterStatement(name="other"), key)
    load_adapter(folder)
    replace_card(folder, "# Another card\n")
    with pytest.raises(PolicyError, match="not signed"):  # the signature was of the earlier card
        load_adapter(folder)
    sign_adapter(folder, AdapterStatement(name="other"), new_key(tmp_path / "other"))
    with pytest.raises(IntegrityError, match="none of the trusted keys"):
        load_adapter(folder)


def test_without_signers_a_signature_changes_nothing(folder: Path, key: Ed25519PrivateKey) -> None:
    before = load_adapter(folder).state.digest
    sign_adapter(folder, AdapterStatement(name="ward"), key)
    assert load_adapter(folder).state.digest == before


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('signers = ["anna"]', "'anna' is no public key"),
        ("min-versions = { ward = 7 }", "needs adapters.signers"),
        ("min-versions = { ward = 0 }", "a table of whole numbers from 1"),
        ("min-versions = 7", "a table of whole numbers from 1"),
    ],
)
def test_a_policy_that_protects_nothing_is_refused(lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(f"[adapters]\n{lines}\n")
    with pytest.raises(ConfigError, match=said):
        load_policy(tmp_path / "site.toml")
