"""What `fedllm check` says of keys that a preset, privacy or "auto" replaces."""

import json
import re
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fedllm.config.recipe import build_config, flatten
from fedllm.config.run_config import RunConfig
from fedllm.errors import DataError, MissingExtraError, ModelError, RowsLostError
from fedllm.plan.run_plan import resolve
from scripts.commands.check_command import check, replaced_values

ROWS = {"lora.init-a": "orthonormal", "privacy.trust": "local", "privacy.metrics": "held-out"}
CLIENTS = {"lora.init-a": "orthonormal", "privacy.trust": "central", "privacy.metrics": "withheld"}
FFA = {"aggregation.train": "b", "aggregation.read-out": "factor-mean"}


@pytest.mark.parametrize(
    ("flat", "in_use"),
    [
        ({"lora.init-a": "kaiming"}, {}),
        ({}, {"lora.init-a": "kaiming"}),
        ({"aggregation.read-out": "stack"}, {"lora.init-a": "kaiming"}),
        ({"aggregation.preset": "flexlora", "privacy.epsilon": 8.0}, ROWS),
        ({"aggregation.read-out": "svd", "privacy.epsilon": 8.0}, {**ROWS, **FFA}),
        (
            {"privacy.epsilon": 8.0, "privacy.unit": "client"},
            {**CLIENTS, **FFA, "aggregation.weighting": "uniform"},
        ),
        ({"aggregation.preset": "fedex"}, {"lora.init-a": "kaiming", "aggregation.read-out": "residual"}),
    ],
)
def test_replaced_values_are_shown(flat: dict[str, Any], in_use: dict[str, str]) -> None:
    assert replaced_values(resolve(RunConfig.from_flat(flat))) == in_use


def test_a_client_that_loses_its_answers_is_an_error_with_the_cure(
    make_model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "Return the list? " * (9 if name == "ben" else 1), "response": "ok", "client": name}
        for name in ("anna", "ben")
        for _ in range(5)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"model.name={make_model_folder('llama')}", f"data.source={rows}", "federation.num-clients=2"]
    with pytest.raises(RowsLostError) as caught:
        check([*words, "train.max-length=40"], on_bad_row="", as_json=True)
    assert "client ben: 5 of 5 rows are skipped" in str(caught.value)
    assert "anna" not in str(caught.value)
    (needed,) = re.findall(r"train\.max-length = (\d+) would keep 5 of 5 whole", str(caught.value))
    check([*words, f"train.max-length={needed}"], on_bad_row="", as_json=True)
    assert json.loads(capsys.readouterr().out)["plan"]["rows lost"] == "none"


def test_the_keys_that_are_printed_are_a_recipe(
    make_model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Return the list.", "client": "anna"}\n' * 4)
    words = [f"model.name={make_model_folder('llama')}", f"data.source={rows}", "federation.num-clients=1"]
    check(words, on_bad_row="", as_json=False, show_all=True)
    printed = re.sub(r" \(in use: .*\)$", "", capsys.readouterr().out.partition("keys (")[2], flags=re.M)
    keys = flatten(tomllib.loads(printed.partition("\n")[2].partition("\nnext:")[0]))
    assert RunConfig.from_flat(keys) == build_config(None, words)


@pytest.fixture
def page(
    make_model_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Return a function (**keys) -> the page of a recipe with these keys more on the command line."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"Return the list {n}.", "client": f"clinic-{n % 2}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.toml").write_text(
        'data.source = "rows.jsonl"\nfederation.num-clients = 2\ntrain.local-steps = 3\n'
        f'model.name = "{make_model_folder("llama")}"\n'
    )

    def show(**keys: object) -> str:
        check(["own.toml", *(f"{key}={value}" for key, value in keys.items())], on_bad_row="", as_json=False)
        return capsys.readouterr().out

    return show


def test_what_was_set_comes_first_with_who_set_it(
    page: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", "elsewhere")
    lines = page(**{"train.local-steps": 5, "privacy.epsilon": 8}).splitlines()
    part = lines[: lines.index("what it means")]
    by = {line.split(" = ")[0].strip(): line for line in part if " = " in line}
    assert by.keys() == {
        *("data.source", "federation.num-clients", "model.name", "train.local-steps", "privacy.epsilon")
    }
    assert by["data.source"].endswith("own.toml")
    assert by["train.local-steps"].split()[2:] == ["5", "command", "line"]
    assert "FEDLLM_CACHE=elsewhere" in part[-1]


def test_the_page_says_who_trains_what_and_what_it_costs(page: Callable[..., str]) -> None:
    shown = page(**{"federation.num-rounds": 7, "run.name": "mine"})
    assert shown.index("what it means") < shown.index("what it costs") < shown.index("figures")
    for words in ("clinic-0", "2 data holders", "7 rounds", "3 steps", "MB up", "runs/mine", "Privacy: none"):
        assert words in shown
    assert re.search(r"about [\d.]+ (s|min|h) of computing and [\d.]+ GB of memory", shown)
    assert "GFLOP/s" in shown
    assert "fedllm run own.toml federation.num-rounds=7 run.name=mine" in shown
    assert "wire.codec" not in shown  # the keys nobody set are behind --all


def test_the_page_says_what_training_at_home_takes(page: Callable[..., str]) -> None:
    keys = {"personal.mode": "finetune", "personal.steps": 9, "federation.num-rounds": 7}
    shown = " ".join(page(**keys).split())
    assert "trains the adapter on with its own rows, at most 9 steps" in shown
    assert "it also trains alone, at most 30 steps, to tell what joining brought." in shown
    assert "No loss of that leaves." in " ".join(page(**keys, **{"privacy.epsilon": 8}).split())


def test_the_page_names_the_privacy_of_a_private_run(page: Callable[..., str]) -> None:
    assert "epsilon 8 at delta" in page(**{"privacy.epsilon": 8}).partition("figures")[0]


def test_the_page_says_that_clients_train_on_at_home(page: Callable[..., str]) -> None:
    shown = page(**{"personal.mode": "finetune", "personal.steps": 7})
    assert "trains the adapter on with its own rows, at most 7 steps" in shown


def test_an_earlier_run_in_the_folder_is_named(page: Callable[..., str], tmp_path: Path) -> None:
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert "holds an earlier run" not in page(), "no round is complete: the run simply starts"
    (checkpoints / "round-00001").mkdir()
    assert "holds an earlier run" in page()
    assert "holds an earlier run" not in page(**{"run.resume": True})


@pytest.mark.parametrize(
    "word",
    ["model.device=cuda:99", "model.device=gpu", "model.device=mps", "model.device=cuda:x"]
    + [f"model.quantization={kind}" for kind in ("4bit", "8bit")],
)
def test_a_device_or_precision_that_is_not_here_is_refused(
    word: str, make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """As the run would: before, each was found only when the clients trained."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Return the list.", "client": "anna"}\n' * 4)
    words = [f"model.name={make_model_folder()}", f"data.source={rows}", "federation.num-clients=1"]
    on_cpu = [] if "device" in word else ["model.device=cpu"]
    with pytest.raises((ModelError, MissingExtraError), match=word.partition("=")[0].replace(".", r"\.")):
        check([*words, word, *on_cpu], on_bad_row="", as_json=False)


def test_a_client_by_another_name_is_shown_with_its_value(
    make_model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    made = (
        {"text": f"Return the list {n}.", "client": client}
        for client in ("ward 7/a", "Zoë Müller")
        for n in range(4)
    )
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    words = [f"model.name={make_model_folder('llama')}", f"data.source={rows}", "federation.num-clients=2"]
    check(words, on_bad_row="", as_json=True)
    figures = json.loads(capsys.readouterr().out)["plan"]
    assert figures["clients renamed"] == "client-0001 = 'ward 7/a'"


def test_a_tokenizer_that_panics_is_one_line_without_a_row(
    make_model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    call = PreTrainedTokenizerFast.__call__

    def panic(self: PreTrainedTokenizerFast, text: str, **options: Any) -> Any:
        if "Return" in text:
            raise Panic(text)
        return call(self, text, **options)

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Return the list.", "client": "anna"}\n' * 4)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", panic)
    words = [f"model.name={make_model_folder()}", f"data.source={rows}", "federation.num-clients=1"]
    with pytest.raises(DataError, match=r"client anna: the tokenizer broke down \(Panic\)") as caught:
        check(words, on_bad_row="", as_json=False)
    assert "Return" not in "".join(traceback.format_exception(caught.value))


def test_rows_that_are_lost_are_told_of_once(
    make_model_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "word " * 90, "response": "So.", "client": "anna"}) + "\n")
    words = [f"model.name={make_model_folder()}", f"data.source={rows}", "federation.num-clients=1"]
    with pytest.raises(RowsLostError, match="client anna: 1 of 1 rows are skipped"):
        check([*words, "train.max-length=16"], on_bad_row="", as_json=False)
    assert "skipped" not in caplog.text
