from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.config.keys import ModelConfig
from fedllm.data.fields import Example, Turn
from fedllm.data.installed_packages import installed_packages
from fedllm.models.base import load_base
from fedllm.models.chat import encode
from scripts.experiments.small_model import Recipe, small_model

TINY = Recipe(
    vocabulary=400, width=16, inner=24, layers=1, heads=2, steps=12, length=32, chars_of_package=80_000
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and three packages of the standard library to read in place of all there are."""
    few = [package for package in installed_packages() if package.name in {"asyncio", "email", "json"}]
    monkeypatch.setattr("scripts.experiments.small_model.installed_packages", lambda: few)
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    return tmp_path


def test_it_is_an_ordinary_model_folder_made_once(cache: Path) -> None:
    made = small_model(TINY)
    weights = (made.folder / "model.safetensors").stat().st_mtime_ns
    assert small_model(TINY) == made
    assert (made.folder / "model.safetensors").stat().st_mtime_ns == weights
    assert made.folder.parent == cache / "experiments"
    assert [file.name for file in made.folder.parent.iterdir()] == [made.folder.name]

    base = load_base(ModelConfig(name=str(made.folder), device="cpu"))
    assert sum(parameter.numel() for parameter in base.model.parameters()) == made.parameters
    row = encode(Example(turns=(Turn("user", "뭐?"), Turn("assistant", "Nothing."))), base.tokenizer, 64)
    assert row is not None
    assert base.tokenizer.decode([token for token in row.labels if token >= 0]) == "Nothing.<|end|>"


def test_training_lowers_the_loss_and_recipes_differ(cache: Path) -> None:
    short, longer = (small_model(replace(TINY, steps=steps)) for steps in (1, 12))
    assert longer.held_out_loss < short.held_out_loss < short.uniform_loss + 0.5
    assert longer.trained_tokens == 12 * TINY.batch_size * TINY.length
    assert short.folder != longer.folder


def test_packages_left_out_change_the_text(cache: Path) -> None:
    assert small_model(TINY).folder != small_model(TINY, left_out={"json"}).folder
