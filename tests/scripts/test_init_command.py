"""`fedllm init` counts rows, never quotes them, and writes a recipe that `fedllm check` takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.recipe import build_config
from fedllm.errors import ConfigError, DataError
from scripts.commands.check_command import check
from scripts.commands.init_command import init


@pytest.fixture
def start(
    make_model_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Return a function (rows) -> what init tells and the keys of its recipe, which check has taken."""
    monkeypatch.chdir(tmp_path)

    def do(rows: list[dict[str, Any]], clients: str = "") -> tuple[str, dict[str, Any]]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / "own.toml"
        out.unlink(missing_ok=True)
        init("rows.jsonl", out=out, model=str(make_model_folder("llama")), clients=clients)
        told = capsys.readouterr().out
        check(["own.toml"], on_bad_row="stop", as_json=True)
        capsys.readouterr()
        return told, build_config(out, []).to_flat()

    return do


def letters(number: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Return {row}?", "response": f"The secret list {row}.", "office": f"o{row % 3}", **more}
        for row in range(number)
    ]


def test_the_column_of_an_owner_makes_the_clients(start: Callable) -> None:
    told, keys = start(letters(60))
    assert (keys["data.partition"], keys["federation.num-clients"]) == ("column:office", 3)
    assert "response as the answer to prompt" in told
    assert "o0 18" in told
    assert "GB of memory" in told
    assert "secret" not in told


def test_clients_of_many_rows_train_on_at_home(start: Callable) -> None:
    assert [start(letters(number))[1]["personal.mode"] for number in (60, 150)] == ["none", "finetune"]


def test_clients_of_few_rows_are_left_out_and_told_of(start: Callable, tmp_path: Path) -> None:
    rows = [*letters(60), *(row | {"office": "late"} for row in letters(3))]
    _, keys = start(rows)
    assert keys["federation.num-clients"] == 3
    assert "1 more with fewer than 8 rows" in (tmp_path / "own.toml").read_text()


def test_where_all_clients_have_few_rows_all_take_part(start: Callable, tmp_path: Path) -> None:
    _, keys = start([row | {"office": f"o{number % 6}"} for number, row in enumerate(letters(30))])
    assert keys["federation.num-clients"] == 6
    assert "6 values, 5 to 5 rows each\n" in (tmp_path / "own.toml").read_text()


def test_rows_without_an_owner_are_dealt_at_random(start: Callable) -> None:
    told, keys = start([{"text": f"Return the list {row}."} for row in range(40)])
    assert (keys["data.partition"], keys["federation.num-clients"]) == ("iid", 5)
    assert "no column names an owner" in told


def test_the_length_keeps_nearly_all_rows_whole(start: Callable) -> None:
    rows = letters(60)
    for row in rows[:2]:
        row["response"] = "the list " * 200
    told, keys = start(rows)
    (taken,) = [line.split() for line in told.splitlines() if "<- taken" in line]
    assert (taken[0], taken[3]) == (str(keys["train.max-length"]), "97%")


def test_columns_of_other_names_are_guessed(start: Callable) -> None:
    rows = [{"nr": row, "frage": f"Return the list {row}?", "antwort": "So it is."} for row in range(40)]
    _, keys = start(rows)
    assert keys["data.columns"] == "prompt=frage,response=antwort"


def test_letters_the_model_does_not_know_are_told_of(start: Callable) -> None:
    told, _ = start([row | {"prompt": "오늘 너무 피곤해", "response": "푹 쉬어요"} for row in letters(40)])
    assert "100% Korean" in told
    assert "tokens a character" in told


def test_the_column_of_clients_can_be_named(start: Callable) -> None:
    rows = [row | {"team": f"t{number % 2}"} for number, row in enumerate(letters(60))]
    assert start(rows, clients="team")[1]["data.partition"] == "column:team"
    with pytest.raises(ConfigError, match="--clients absent"):
        start(rows, clients="absent")


def test_rows_of_no_text_are_one_line(start: Callable) -> None:
    with pytest.raises(DataError, match="no column of text"):
        start([{"nr": 4, "sum": 2.5}] * 8)


def test_a_recipe_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("seed = 1\n")
    with pytest.raises(ConfigError, match="is there already"):
        init("docstrings", out=tmp_path / "own.toml", model="", clients="")
    assert (tmp_path / "own.toml").read_text() == "seed = 1\n"
    with pytest.raises(ConfigError, match=r"name it own\.toml"):
        init("docstrings", out=tmp_path / "own.yaml", model="", clients="")
