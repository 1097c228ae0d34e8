"""The token budget: measured once, remembered, and never a reason to fail."""

import json
from pathlib import Path

import pytest
import torch

from fedllm.engine.token_budget import measured_budget, remembered_budget

CPU = torch.device("cpu")


def test_the_measured_budget_is_a_size_that_was_tried() -> None:
    tried: list[int] = []
    assert measured_budget(tried.append, CPU) in tried
    assert all(size & (size - 1) == 0 for size in tried)


def test_a_machine_out_of_memory_keeps_what_fitted() -> None:
    def run_pass(size: int) -> None:
        if size > 512:
            raise torch.OutOfMemoryError

    assert measured_budget(run_pass, CPU) <= 512


def test_a_budget_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    answers = iter([256, 999])
    assert [remembered_budget("model / cpu", lambda: next(answers)) for _ in range(3)] == [256] * 3
    assert remembered_budget("other / cpu", lambda: next(answers)) == 999
    assert json.loads((tmp_path / "token-budgets.json").read_text()) == {
        "model / cpu": 256,
        "other / cpu": 999,
    }


@pytest.mark.parametrize("content", ["", "[]", '{"model": -1}', '{"model": "x"}', "not json"])
def test_a_damaged_memory_is_measured_again(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    (tmp_path / "token-budgets.json").write_text(content)
    assert remembered_budget("model", lambda: 128) == 128
