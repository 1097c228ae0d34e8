"""The benchmark of scoring choices: its items, and that it needs lm-evaluation-harness."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.errors import MissingExtraError
from scripts.benchmarks.evaluation import NUM_CHOICES, Options, docstring_task, main


@pytest.mark.soak
def test_items_are_docstrings_with_the_right_one_among_others() -> None:
    task = docstring_task(6)
    assert (task.kind, len(task.items), task.chance) == ("choice", 6, 1 / NUM_CHOICES)
    assert len({item.choices[item.right] for item in task.items}) == 6


def test_the_harness_is_named_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match="lm-evaluation-harness"):
        main(Options(quick=True))


def test_both_give_the_same_figures(
    make_model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'fedllm[eval]'")
    main(Options(quick=True, json=True, model=str(make_model_folder())))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["figures"]["tasks"]["docstrings"]["largest_difference_nats"] < 1e-3
    assert set(report["goals"]) == {"lm_eval_over_ours_all_tasks"}
