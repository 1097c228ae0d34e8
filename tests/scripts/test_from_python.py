"""The configuration of `fedllm.run`: a recipe and keys, as on the command line."""

from pathlib import Path

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from scripts.from_python import config_from
from scripts.recipe_arguments import config_of


@pytest.mark.parametrize("recipe", [None, "quickstart", "quickstart.toml"])
def test_keys_are_sections_or_dotted_names(recipe: str | None) -> None:
    keys = {"seed": 3, "train": {"local_steps": 7, "learning-rate": 0.1}, "lora.target_modules": ["q_proj"]}
    words = ["seed=3", "train.local-steps=7", "train.learning-rate=0.1", "lora.target-modules=q_proj"]
    assert config_from(recipe, keys) == config_of(words)


def test_own_text_has_the_defaults_of_keys_as_in_a_shell() -> None:
    source = {"data": {"source": "mine.jsonl"}}
    assert config_from(None, source) == config_of(["data.source=mine.jsonl"])
    assert config_from("quickstart", source) == config_of(["quickstart", "data.source=mine.jsonl"])


def test_a_recipe_is_a_file_or_a_configuration_too(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[lora]\nrank = 3\n")
    given = RunConfig.from_flat({"lora.rank": 3})
    assert config_from(file, {}) == config_from(given, {}) == given
    assert config_from(given, {"seed": 1}) == given.override({"seed": 1})


@pytest.mark.parametrize(
    ("recipe", "keys", "words"),
    [
        ("quickstat", {}, "recipe quickstat.toml: No such file"),
        (None, {"lora": {"rnk": 3}}, "unknown key 'lora.rnk'; did you mean 'lora.rank'"),
        (None, {"lora": {"rank": "x"}}, "lora.rank = 'x': expected a whole number"),
    ],
)
def test_what_is_wrong_is_one_line(recipe: str | None, keys: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(recipe, keys)
    assert str(caught.value).startswith(words)
