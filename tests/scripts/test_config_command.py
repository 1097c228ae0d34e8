"""`fedllm config` explains keys."""

import json

import pytest

from fedllm.config.run_config import KEYS
from fedllm.config.schema import recipe_schema
from fedllm.errors import ConfigError
from scripts.commands.config_command import config


def test_a_key_is_explained_with_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    config("lora.rank", json_schema=False)
    told = capsys.readouterr().out
    for words in ("lora.rank = 8", KEYS["lora.rank"].meaning, "a whole number from 1 up to 4,096"):
        assert words in told


def test_a_section_has_its_keys_and_no_name_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    def keys_told() -> list[str]:
        lines = capsys.readouterr().out.splitlines()
        return [name for line in lines if (name := line.strip().partition(" = ")[0]) in KEYS]

    config("wire", json_schema=False)
    assert keys_told() == [name for name in KEYS if name.startswith("wire.")]
    config("", json_schema=False)
    assert keys_told() == list(KEYS)


def test_another_word_names_the_nearest_key() -> None:
    with pytest.raises(ConfigError, match=r"'rank'; did you mean 'lora\.rank'\?"):
        config("rank", json_schema=False)


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    config("", json_schema=True)
    assert json.loads(capsys.readouterr().out) == recipe_schema()
