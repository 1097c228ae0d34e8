"""What a run's folder says of memorisation: of the adapter that is published, and of no other."""

import json
from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from fedllm.runs.memorisation import MEMORISATION, read_memorisation, write_memorisation

FIGURES = {"extraction": 0.25, "extraction_held_out": 0.0}


def test_figures_are_of_the_published_adapter_alone(tmp_path: Path) -> None:
    assert read_memorisation(tmp_path) == {}
    (tmp_path / "result.json").write_text(json.dumps({"digest": "new"}))
    write_memorisation(tmp_path, "new", FIGURES)
    assert read_memorisation(tmp_path) == FIGURES
    write_memorisation(tmp_path, "old", FIGURES)
    assert read_memorisation(tmp_path) == {}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"adapter": "new"}', '{"adapter": "new", "figures": {"a": []}}']
)
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"digest": "new"}))
    (tmp_path / MEMORISATION).write_text(content)
    with pytest.raises(ConfigError, match=MEMORISATION):
        read_memorisation(tmp_path)
