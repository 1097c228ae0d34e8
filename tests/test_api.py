"""fedllm from Python: light to import, and its own packages whatever else has their names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fedllm
from fedllm.adapters.folder import load_adapter
from fedllm.errors import ConfigError


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'runner'"):
        fedllm.runner  # noqa: B018


@pytest.fixture
def tiny(make_model_folder: Callable[..., Path], tmp_path: Path) -> dict:
    """Return the keys of a run of two clients, one round and a tiny model."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"q{n}", "response": "a b", "client": "ab"[n % 2]} for n in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "run": {"output": str(tmp_path / "runs"), "name": "tiny"},
        "model": {"name": str(make_model_folder()), "device": "cpu", "num_threads": 1},
        "data": {"source": str(rows)},
        "federation": {"num_clients": 2, "num_rounds": 1},
        "train": {"local_steps": 1, "max_length": 32},
        "lora.rank": 2,
    }


def test_a_run_gives_its_folder_losses_and_records(tiny: dict, tmp_path: Path) -> None:
    result = fedllm.run(**tiny)
    assert result == fedllm.Result(tmp_path / "runs" / "tiny")
    assert {name: set(column) for name, column in result.losses.items()} == {
        "base": {"a", "b"},
        "adapter": {"a", "b"},
    }
    assert [record.round_num for record in result.records] == [0, 1]
    assert result.losses["adapter"] == result.records[1].held_out
    assert load_adapter(result.adapter).state.digest == result.summary["digest"]
    assert result.plot() == result.folder / "losses.svg"
    assert "<svg" in result.plot(tmp_path / "own.svg").read_text()
    assert "<html" in result.report().read_text()
    with pytest.raises(ConfigError, match="holds an earlier run"):
        fedllm.run(**tiny)
    longer = {**tiny, "federation": {"num_clients": 2, "num_rounds": 2}}
    assert len(fedllm.run(**longer, resume=True).records) == 3


def test_losses_have_a_column_for_all_that_was_measured(tmp_path: Path) -> None:
    before, after = {"clients": {"a": 3.0}}, {"clients": {"a": 2.0}, "personal": {"clients": {"a": 1.0}}}
    home = {"clients": {"a": {"alone": 1.5, "shared": 1.8, "home": 1.2, "steps": 4}}}
    result = {"held_out": {"before": before, "after": after}, "at_home": home}
    (tmp_path / "result.json").write_text(json.dumps(result))
    columns = {"base": 3.0, "adapter": 2.0, "personal": 1.0, "alone": 1.5, "shared": 1.8, "home": 1.2}
    assert fedllm.Result(tmp_path).losses == {name: {"a": loss} for name, loss in columns.items()}
    for nothing in ({"held_out": {}}, {"status": "failed", "reason": "no space"}):
        (tmp_path / "result.json").write_text(json.dumps(nothing))
        assert fedllm.Result(tmp_path).losses == {}


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run that has ended"):
        fedllm.Result(tmp_path).losses  # noqa: B018
