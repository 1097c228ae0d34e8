"""A CPU takes bfloat16 where it is measured to pay, for models that are large enough, and goes on with it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedllm.config.keys import ModelConfig
from fedllm.models import half_precision
from fedllm.models.base import choose_dtype, how_held
from fedllm.models.files import ModelFiles, resolve_model

CPU = torch.device("cpu")


def large_model(folder: Path, shape: tuple[int, int], number: int) -> ModelFiles:
    """Return a model of so many matrices of zeros; the file has holes and takes no room."""
    size = 2 * shape[0] * shape[1]
    header = {
        f"layer.{place}": {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [size * place, size * (place + 1)],
        }
        for place in range(number)
    }
    written = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + size * number)
    return ModelFiles(folder, folder.name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[float, str], None]]:
    """Return what gives this machine a rate of bfloat16's products over float32's, and a kind of units."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))

    def become(rate: float, units: str = "AVX512") -> None:
        half_precision.pays.cache_clear()
        monkeypatch.setattr(half_precision, "gain", lambda shapes: rate)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)

    yield become
    half_precision.pays.cache_clear()


def test_auto_is_bfloat16_where_its_products_are_faster(machine: Callable, tmp_path: Path) -> None:
    files = large_model(tmp_path / "large", (4096, 4096), 4)
    for rate, expected in ((1.4, torch.float32), (1.6, torch.bfloat16)):
        machine(rate)
        assert choose_dtype("auto", CPU, files) == expected
        (tmp_path / "cache" / "cpu-bfloat16.json").unlink()
    machine(9.0, "AVX2")
    assert choose_dtype("auto", CPU, files) == torch.float32, "nothing is measured without units"
    machine(9.0)
    assert choose_dtype("float32", CPU, files) == torch.float32, "who asks for it gets it"


def test_the_choice_is_remembered(machine: Callable, tmp_path: Path) -> None:
    files = large_model(tmp_path / "large", (4096, 4096), 4)
    machine(3.0)
    assert half_precision.pays(files)
    machine(0.5)
    assert half_precision.pays(files), "a run that is resumed goes on in the type it began in"


def test_small_models_stay_in_float32(machine: Callable, tmp_path: Path, make_model_folder: Callable) -> None:
    machine(9.0)
    name = str(make_model_folder())
    assert not half_precision.pays(large_model(tmp_path / "small", (2048, 2048), 11))
    assert choose_dtype("auto", CPU, resolve_model(name)) == torch.float32
    assert how_held(ModelConfig(name=name, device="cpu")) == {"dtype": "float32", "device": "cpu"}
    assert how_held(ModelConfig(name=str(tmp_path / "absent"))) == {}


def test_shapes_are_read_from_headers(tmp_path: Path) -> None:
    files = large_model(tmp_path / "large", (64, 32), 3)
    assert half_precision.shapes_of(files.folder) == {(64, 32): 3}
    (files.folder / "model.safetensors").write_bytes(b"damaged")
    assert half_precision.shapes_of(files.folder) == {}
    assert half_precision.gain({(64, 32): 3}) > 0
