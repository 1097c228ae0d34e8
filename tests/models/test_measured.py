"""A number is measured once and remembered; a damaged memory is no reason to fail."""

import json
from pathlib import Path

import pytest

from fedllm.models.measured import remembered


def test_a_number_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    answers = iter([256, 999])
    assert [remembered("numbers.json", "model", lambda: next(answers)) for _ in range(3)] == [256] * 3
    assert remembered("numbers.json", "other", lambda: next(answers)) == 999
    assert json.loads((tmp_path / "numbers.json").read_text()) == {
        "model": 256,
        "other": 999,
    }


@pytest.mark.parametrize("content", ["", "[]", '{"model": -1}', '{"model": "x"}', "not json"])
def test_a_damaged_memory_is_measured_again(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    (tmp_path / "numbers.json").write_text(content)
    assert remembered("numbers.json", "model", lambda: 128) == 128


def test_processes_that_measure_together_take_one_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))

    def measure() -> int:
        assert remembered("numbers.json", "model", lambda: 100) == 100  # another process is done first
        return 200

    assert remembered("numbers.json", "model", measure) == 100
