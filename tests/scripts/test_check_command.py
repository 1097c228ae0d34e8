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
from fedllm.errors import DataError, MissingExtraError, ModelError
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


def test_the_keys_that_are_printed_are_a_recipe(
    make_model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Return the list.", "client": "anna"}\n' * 4)
    words = [f"model.name={make_model_folder('llama')}", f"data.source={rows}", "federation.num-clients=1"]
    check(words, on_bad_row="", as_json=False)
    printed = re.sub(r" \(in use: .*\)$", "", capsys.readouterr().out.partition("keys (")[2], flags=re.M)
    keys = flatten(tomllib.loads(printed.partition("\n")[2]))
    assert RunConfig.from_flat(keys) == build_config(None, words)


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

    def panic(self: object, text: str, **options: object) -> None:
        raise Panic(text)

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Return the list.", "client": "anna"}\n' * 4)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", panic)
    words = [f"model.name={make_model_folder()}", f"data.source={rows}", "federation.num-clients=1"]
    with pytest.raises(DataError, match=r"client anna: the tokenizer broke down \(Panic\)") as caught:
        check(words, on_bad_row="", as_json=False)
    assert "Return" not in "".join(traceback.format_exception(caught.value))
