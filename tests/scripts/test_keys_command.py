import tomllib
from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from fedllm.identity import load_key, public_text
from scripts.commands import keys_command


def test_the_lines_of_a_new_key_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "site.key"
    keys_command.new(path)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    said = tomllib.loads("\n".join(line for line in lines if " = " in line))
    public = public_text(load_key(path))
    assert said == {"key": str(path), "public-key": public, "signers": [public]}
    with pytest.raises(ConfigError, match="exists already"):
        keys_command.new(path)
