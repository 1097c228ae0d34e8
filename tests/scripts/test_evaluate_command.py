"""`fedllm evaluate`: targets as columns, tasks, losses of clients, the matrix, what a run folder keeps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.adapters.folder import save_adapter
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.config.keys import LoraConfig
from fedllm.models.base import BaseModel, layout_of
from fedllm.runs.folder import RESULT, write_result
from scripts import cli
from scripts.evaluation.kept import EVALUATION, keep, read
from scripts.finished_run import trained_clients


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"held_out": {"after": {"clients": {"anna": 1.0, "ben": 2.0}}}}', ["anna", "ben"]),
        ('{"held_out": null}', []),
        ('{"held_out": {"after": {"clients": 3}}}', []),
        ("[]", []),
        ("{", []),
    ],
)
def test_a_malformed_result_names_no_clients(text: str, names: list[str], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    assert trained_clients(tmp_path) == names


@pytest.fixture(scope="module")
def model(make_model_folder: Callable[..., Path]) -> str:
    return str(make_model_folder())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two clients, and a task."""
    folder = tmp_path_factory.mktemp("rows")
    texts = [
        {"prompt": f"Row {place}?", "response": f"It is {place}", "client": "ab"[place % 2]}
        for place in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    quiz = [
        {"question": f"Why {place}?", "choices": ["so", "not so"], "answer": place % 2} for place in range(6)
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    return folder


@pytest.fixture(scope="module")
def run(model: str, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two clients with personal adapters."""
    return _run(model, rows, tmp_path_factory.mktemp("runs"), **{"personal.mode": "dual:rank=2"})


def _run(model: str, rows: Path, out: Path, **more: object) -> Path:
    keys = {
        "model.name": model,
        "data.source": rows / "rows.jsonl",
        "federation.num-clients": 2,
        "federation.num-rounds": 1,
        "data.held-out-fraction": 0.3,
        "evaluation.prompts": "",
        "run.name": "made",
        **more,
    }
    words = [f"{key}={value}" for key, value in keys.items()]
    assert _fedllm("run", *words, "--out", str(out), "--json") == 0
    return out / "made"


def _fedllm(*words: str) -> int:
    return cli.run_app(cli.app, list(words), name="fedllm")


def _evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert _fedllm("evaluate", *words, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_tasks_compare_a_run_with_its_base_model(
    run: Path, model: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("--tasks", str(rows / "quiz.jsonl"))
    found = _evaluated(capsys, str(run), *tasks, "--flowertune", "--limit", "4")["tasks"]["quiz"]
    assert (found["kind"], found["items"], found["chance"]) == ("choice", 4, 0.5)
    assert list(found["adapters"]) == ["base", "made"]
    assert "flowertune-rule" in found["adapters"]["made"]["differences"]
    assert read(run)["tasks"]["quiz"] == found
    alone = _evaluated(capsys, model, *tasks, "--limit", "4")["tasks"]["quiz"]
    assert alone["adapters"]["base"]["outcomes"] == found["adapters"]["base"]["outcomes"]


def test_losses_of_clients_are_kept_in_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _evaluated(capsys, str(run))
    result = json.loads((run / "result.json").read_text())
    losses = {name: row["adapter"]["loss"] for name, row in found["clients"].items()}
    assert losses == pytest.approx(result["held_out"]["after"]["clients"])
    assert read(run)["clients"] == found["clients"]


def test_a_matrix_has_each_clients_own_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _evaluated(capsys, str(run), "--matrix")["matrix"]
    result = json.loads((run / "result.json").read_text())["held_out"]
    losses = found["losses"]
    assert list(losses["a"]) == ["base", "made", "own:a", "own:b"]
    for column, section in (("base", result["before"]), ("made", result["after"])):
        assert {name: row[column] for name, row in losses.items()} == pytest.approx(section["clients"])
    personal = result["after"]["personal"]["clients"]
    assert {name: losses[name][f"own:{name}"] for name in losses} == pytest.approx(personal)
    assert found["own"]["on_others"] == pytest.approx((losses["a"]["own:b"] + losses["b"]["own:a"]) / 2)


def test_a_matrix_has_what_clients_trained_at_home(
    model: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(model, rows, tmp_path, **{"personal.mode": "finetune", "personal.steps": 4})
    losses = _evaluated(capsys, str(run), "--matrix")["matrix"]["losses"]
    assert list(losses["a"]) == ["base", "made", "own:a", "own:b"]
    for name, row in losses.items():
        folder = next(run.glob(f"private/made-*/{name}/home"))
        named = _evaluated(capsys, str(run), str(folder), "--matrix")["matrix"]["losses"]
        assert named[name]["home"] == pytest.approx(row[f"own:{name}"])


def test_tables_name_every_adapter_and_the_interval(
    run: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert _fedllm("evaluate", str(run), "--tasks", str(rows)) == 0
    shown = capsys.readouterr().out
    assert "95 % interval" in shown
    assert all(
        word in shown
        for word in ("quiz", "accuracy-normalised", "top-3", "made", "more than base", "by chance")
    )
    assert _fedllm("evaluate", str(run), "--matrix") == 0
    assert "own:b" in capsys.readouterr().out


def test_clients_are_those_of_the_run_among_the_targets(
    run: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "made")
    same = str(tmp_path / "made")
    losses = _evaluated(capsys, same, str(run))["matrix"]["losses"]
    assert list(losses["a"]) == ["base", same, str(run), "own:a", "own:b"]
    assert losses["a"][same] == losses["a"][str(run)]
    shutil.copytree(run, tmp_path / "elsewhere")
    result = json.loads((tmp_path / "elsewhere" / "result.json").read_text())
    result["held_out"]["after"]["clients"] = {"anna": 1.0}  # a site's, whose rows are not here
    (tmp_path / "elsewhere" / "result.json").write_text(json.dumps(result))
    for words, told in (
        ((model, same), "no run, whose clients have rows"),
        ((model, str(tmp_path / "elsewhere")), "keep their rows elsewhere"),
    ):
        assert _fedllm("evaluate", *words) == 2
        assert told in capsys.readouterr().err


def test_adapters_of_other_ranks_share_a_table(
    run: Path,
    rows: Path,
    load_tiny: Callable[..., BaseModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = load_tiny()
    layout = layout_of(base.model, LoraConfig(rank=2, target_modules="q_proj"), base.fingerprint)
    state = AdapterState(layout, initial_adapter(layout, 1).vector + 0.1 * torch.ones(layout.size))
    other = tmp_path / "other"
    named = {"base_model": str(base.files.folder), "revision": "", "target_modules": ["q_proj"], "card": ""}
    save_adapter(other, state, **named)
    found = _evaluated(capsys, str(run), str(other), "--tasks", str(rows / "quiz.jsonl"))
    assert list(found["tasks"]["quiz"]["adapters"]) == ["base", "made", "other"]
    losses = _evaluated(capsys, str(run), str(other))["matrix"]["losses"]
    assert {"base", "made", "other"} <= losses["a"].keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere/at-all", "--tasks", "x.jsonl"), "neither a run, an adapter nor a base model"),
        (("{model}",), "name --tasks, --suite, or --data"),
        (("{model}", "--tasks", "x.jsonl", "--matrix"), "--data and --matrix are without them"),
        (("{model}", "--suite", "generl"), "expected one of general, keyboard, medical"),
        (("{model}", "--tasks", "absent.jsonl"), "absent.jsonl"),
        (("{empty}",), "neither a run with a complete round nor an adapter folder"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    words: tuple[str, ...],
    message: str,
    model: str,
    tmp_path: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [word.format(model=model, empty=tmp_path) for word in words]
    filled = [str(rows / "quiz.jsonl") if word == "x.jsonl" else word for word in filled]
    assert _fedllm("evaluate", *filled) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_what_was_found_before_stays(tmp_path: Path) -> None:
    write_result(tmp_path, {"digest": "d"})
    keep(tmp_path, {"tasks": {"one": 1}, "clients": {"a": 2}})
    keep(tmp_path, {"tasks": {"two": 2}})
    assert read(tmp_path) == {"tasks": {"one": 1, "two": 2}, "clients": {"a": 2}, "adapter": "d"}
    (tmp_path / EVALUATION).write_text("{")
    assert read(tmp_path) == {}


def test_what_was_found_of_another_adapter_is_not_shown_as_this_ones(tmp_path: Path) -> None:
    write_result(tmp_path, {"digest": "d"})
    keep(tmp_path, {"tasks": {"one": 1}, "clients": {"a": 2}})
    (tmp_path / RESULT).unlink()  # the run goes on
    keep(tmp_path, {"tasks": {"two": 2}})
    assert read(tmp_path) == {}
    write_result(tmp_path, {"digest": "e"})
    assert read(tmp_path) == {}
    keep(tmp_path, {"tasks": {"two": 2}})
    assert read(tmp_path) == {"tasks": {"two": 2}, "adapter": "e"}


def test_the_harness_is_named_where_it_is_absent(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert _fedllm("evaluate", str(run), "--harness", "piqa") == 2
    assert "pip install 'fedllm[eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_is_called_with_the_adapter(
    run: Path, model: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'fedllm[eval]'")
    task = tmp_path / "quiz.yaml"
    task.write_text(
        f"""task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows / "quiz.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
"""
    )
    found = _evaluated(capsys, model, str(run), "--harness", str(task), "--limit", "6")["harness"]["results"]
    ours = _evaluated(capsys, str(run), "--tasks", str(rows / "quiz.jsonl"))["tasks"]["quiz"]["adapters"]
    for target, column in ((model, "base"), (str(run), "made")):
        (figures,) = found[target].values()
        assert figures["acc,none"] == ours[column]["figures"]["accuracy"]["value"]
        assert figures["acc_norm,none"] == ours[column]["figures"]["accuracy-normalised"]["value"]
