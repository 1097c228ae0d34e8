import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.adapters.folder import DESCRIPTION, WEIGHTS, load_adapter, save_adapter
from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix
from fedllm.config.keys import LoraConfig
from fedllm.engine.adapter_bank import Bank
from fedllm.engine.kernels import LoopKernel
from fedllm.engine.layers import attached
from fedllm.errors import IntegrityError, NonFiniteError
from fedllm.files import MANIFEST, write_manifest
from fedllm.models.base import layout_of

LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), 2, 4.0, "f" * 64)
FIRST = LAYOUT.tensors[0].name


def random_state(layout: AdapterLayout, seed: int = 0) -> AdapterState:
    vector = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)) * 0.3
    return AdapterState(layout, vector)


def save(folder: Path, state: AdapterState, target_modules: tuple[str, ...] = ("a", "c")) -> None:
    options = {"base_model": "org/base", "revision": "v1", "card": "# A card\n"}
    save_adapter(folder, state, target_modules=target_modules, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "adapter", random_state(LAYOUT))
    return tmp_path / "adapter"


def test_an_adapter_comes_back_bit_for_bit(folder: Path) -> None:
    loaded = load_adapter(folder)
    assert loaded.state.digest == random_state(LAYOUT).digest
    assert (loaded.base_model, loaded.revision) == ("org/base", "v1")
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["README.md", "adapter_config.json", WEIGHTS, DESCRIPTION, MANIFEST]
    )


def test_saving_again_replaces_the_folder_whole(folder: Path) -> None:
    (folder / "stray.txt").write_text("x")
    save(folder, random_state(LAYOUT, seed=1))
    assert load_adapter(folder).state.digest == random_state(LAYOUT, seed=1).digest
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_an_adapter_that_is_not_finite_is_never_published(folder: Path) -> None:
    bad = random_state(LAYOUT, seed=1)
    bad.vector[3] = float("nan")
    with pytest.raises(NonFiniteError):
        save(folder, bad)
    assert load_adapter(folder).state.digest == random_state(LAYOUT).digest


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_published_folder_computes_the_same_in_peft(
    kind: str, tmp_path: Path, load_tiny: Callable, make_model_folder: Callable
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_tiny(kind)
    layout = layout_of(base.model, LoraConfig(rank=3, alpha=6.0), base.fingerprint)
    state = random_state(layout)
    names = sorted({matrix.module.rpartition(".")[2] for matrix in layout.matrices})
    save(tmp_path / "adapter", state, tuple(names))

    tokens = torch.arange(5, 25)[None]
    bank = Bank(layout, LoopKernel(), base.device, torch.float32)
    bank.load(layout, [state.vector], [layout.scale])
    with torch.no_grad():
        without = base.model(tokens).logits
        with attached(base.model, bank), bank.whole_rows([0]):
            ours = base.model(tokens).logits
        fresh = AutoModelForCausalLM.from_pretrained(make_model_folder(kind))
        theirs = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()(tokens).logits
    assert float((ours - without).abs().max()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return damage


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.z.lora_A.weight"] = tensors.pop(FIRST)


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[FIRST]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["more"] = torch.zeros(2)


def _transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST].T


def _other_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST][:1]


def _other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST].bfloat16()


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST][0, 0] = float("nan")


def _describe(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        description = json.loads((folder / DESCRIPTION).read_text())
        description["layout"].update(changes)
        (folder / DESCRIPTION).write_text(json.dumps(description))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        *map(_rewrite, [_renamed, _missing, _extra, _transposed, _other_rank, _other_dtype, _nan]),
        _describe(rank=1),
        _describe(rank=None),
        _describe(rank=-1),
        _describe(rank=0),
        _describe(rank=2**40),
        _describe(alpha=float("inf")),
        _describe(matrices=[]),
        lambda folder: (folder / DESCRIPTION).write_text("{}"),
        lambda folder: (folder / DESCRIPTION).write_text("[]"),
        lambda folder: (folder / DESCRIPTION).write_text("not JSON"),
        lambda folder: (folder / DESCRIPTION).unlink(),
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4]),
        lambda folder: (folder / WEIGHTS).write_bytes(b""),
        lambda folder: (folder / "adapter_model.bin").write_bytes(b"\x80\x04."),
    ],
)
def test_folder_of_other_tensors_is_refused_despite_its_manifest(
    folder: Path, damage: Callable[[Path], object]
) -> None:
    damage(folder)
    write_manifest(folder)
    with pytest.raises(IntegrityError) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)


def _flip(name: str, position: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _flip(WEIGHTS, -1),
        _flip(WEIGHTS, 9),
        _flip("adapter_config.json", 40),
        _flip("README.md", 0),
        _flip(DESCRIPTION, 20),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{}"),
        lambda folder: (folder / MANIFEST).write_text('{"sha256": []}'),
        lambda folder: (folder / "extra.txt").write_text("x"),
        lambda folder: (folder / "README.md").unlink(),
        lambda folder: (folder / WEIGHTS).unlink(),
        *(
            lambda folder, suffix=suffix: (folder / f"weights{suffix}").write_bytes(b"\x80\x04.")
            for suffix in (".bin", ".pt", ".pth", ".pkl")
        ),
    ],
)
def test_folder_unlike_its_manifest_is_refused(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder)
    with pytest.raises(IntegrityError) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_adapter_folder_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(IntegrityError, match="not an adapter folder"):
            load_adapter(path)
