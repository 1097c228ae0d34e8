"""Code that a model folder brings runs only where the policy names the digest of that very code."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.errors import ModelError
from fedllm.models.base import load_tokenizer, open_skeleton
from fedllm.models.files import resolve_model
from fedllm.models.folders import code_digest, may_run_code
from fedllm.models.tokenizer_fit import check_tokenizer_fits, num_embeddings

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_kind"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Name the file that the model's code writes when it runs."""
    return tmp_path / "it-ran"


@pytest.fixture
def folder(model_copy: Path, edit_json: Callable, marker: Path) -> Path:
    """Return a model folder with code of its own that calls itself a model the policy may trust."""
    (model_copy / "own.py").write_text(CODE.format(marker=str(marker)))
    edit_json(
        model_copy / "config.json",
        _name_or_path="org/trusted",
        model_type="own_kind",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    return model_copy


@pytest.fixture
def trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def do(*entries: str) -> None:
        (tmp_path / "site.toml").write_text(f"[allow]\ntrust-remote-code = {json.dumps(entries)}")
        monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))

    return do


@pytest.mark.parametrize("entries", [(), ("org/trusted",), ("copy",), ("sha256:" + "0" * 64,), ("sha256:",)])
def test_a_name_a_folder_gives_itself_runs_no_code(
    entries: tuple[str, ...], folder: Path, marker: Path, trust: Callable
) -> None:
    trust(*entries)
    with pytest.raises(ModelError, match=f"org/trusted@sha256:{code_digest(folder)}") as caught:
        open_skeleton(resolve_model(str(folder)))
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_measuring_a_model_asks_for_the_digest_too(folder: Path, marker: Path, trust: Callable) -> None:
    trust("org/trusted")
    with pytest.raises(ModelError, match="cannot read org/trusted"):
        num_embeddings(resolve_model(str(folder)))
    assert not marker.exists()
    trust(f"sha256:{code_digest(folder)}")
    files = resolve_model(str(folder))
    assert check_tokenizer_fits(files, load_tokenizer(files), 10**6)  # beyond the positions that it declares
    assert marker.exists()


@pytest.mark.parametrize("form", ["{}", "org/trusted@{}", "any words@{}"])
def test_the_digest_of_its_code_permits_exactly_that_code(
    form: str, folder: Path, marker: Path, trust: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trust(form.format(f"sha256:{code_digest(folder)}"))
    assert may_run_code(folder)
    (folder / "own.py").write_text((folder / "own.py").read_text() + "\n# changed\n")
    with pytest.raises(ModelError, match="trust-remote-code"):
        open_skeleton(resolve_model(str(folder)))
    assert not marker.exists()


def test_the_digest_covers_every_file_and_what_is_said_of_them(folder: Path, edit_json: Callable) -> None:
    seen = {code_digest(folder)}
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.py").write_text("")
    seen.add(code_digest(folder))
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    seen.add(code_digest(folder))
    os.rename(folder / "own.py", folder / "other.py")
    seen.add(code_digest(folder))
    assert len(seen) == 4


def test_code_of_another_repository_never_runs(folder: Path, edit_json: Callable, trust: Callable) -> None:
    edit_json(folder / "config.json", auto_map={"AutoConfig": "org/other--own.OwnConfig"})
    trust(f"sha256:{code_digest(folder)}", "org/other", "org/trusted")
    assert not may_run_code(folder, "org/trusted")


@pytest.mark.parametrize("place", ["linked/own", "{outside}/own"])
def test_code_outside_the_folder_never_runs(
    place: str, folder: Path, edit_json: Callable, trust: Callable, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "own.py").rename(outside / "own.py")
    if place.startswith("linked"):
        (folder / "linked").symlink_to(outside)
    edit_json(folder / "config.json", auto_map={"AutoConfig": f"{place.format(outside=outside)}.OwnConfig"})
    trust(f"sha256:{code_digest(folder)}")
    assert not may_run_code(folder)


def test_links_to_files_are_followed_by_the_digest(folder: Path, trust: Callable, tmp_path: Path) -> None:
    before = code_digest(folder)
    (folder / "own.py").rename(tmp_path / "blob")
    (folder / "own.py").symlink_to(tmp_path / "blob")
    trust(f"sha256:{before}")
    assert may_run_code(folder)
    (tmp_path / "blob").write_text("# changed\n")
    assert not may_run_code(folder)


@pytest.mark.parametrize(
    "content", ['{"version": "1.0", "added_tok', "", "[]", '{"added_tokens": [], "model": 3}']
)
def test_a_damaged_tokenizer_is_refused_in_one_line(content: str, model_copy: Path) -> None:
    (model_copy / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="no tokenizer in copy") as caught:
        load_tokenizer(resolve_model(str(model_copy)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "is_run"),
    [("org/trusted", True), ("org/trusted@refs/pr/1", False), ("org/trusted@v1", True), ("org/other", False)],
)
def test_a_hub_id_permits_no_revision_that_it_does_not_name(
    name: str, is_run: bool, folder: Path, trust: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may propose a revision on the hub, and a server names the one that is opened."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    trust("org/trusted", "org/trusted@v1")
    assert resolve_model(name).runs_own_code is is_run
