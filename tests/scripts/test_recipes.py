"""The shipped recipes: `fedllm check` takes each, on rows of the columns it names, and it trains."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.config.recipe import read_recipe
from fedllm.config.schema import recipe_schema
from fedllm.errors import ConfigError
from scripts.commands.check_command import check
from scripts.commands.recipes_command import recipes
from scripts.commands.run_command import run
from scripts.recipe_arguments import RECIPES, config_of, first_comment, shipped_recipes

NAMES = sorted(path.stem for path in RECIPES.iterdir())
# Numbers of the recipe that only make a test long; what a recipe is stays.
SMALL = ("federation.num-rounds=1", "train.local-steps=1", "train.batch-size=2", "model.dtype=float32")
SMALL += ("evaluation.max-new-tokens=2", "data.max-held-out=1", "data.max-rows=8")
SMALL += ("distill.num-texts=4", "distill.max-tokens=16", "distill.steps=1")
MOST_CLIENTS = 60


@pytest.fixture
def words(make_model_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], list[str]]:
    """Return a function (recipe) -> what runs it here: a tiny model, and rows of the columns it names."""

    def of(name: str) -> list[str]:
        config = config_of([name])
        given = [name, f"model.name={make_model_folder('llama')}", "model.quantization=none", *SMALL]
        if name == "quickstart":
            return given
        number = min(MOST_CLIENTS, config.federation.num_clients)
        owner = (
            config.data.partition.removeprefix("column:") if "column" in config.data.partition else "client"
        )
        rows = [
            {
                "instruction": "Return",
                "input": f"the list {row}.",
                "output": "a file",
                owner: f"c{row % number}",
            }
            for row in range(8 * number)
        ]
        if name == "keyboard":
            rows = [{"text": "Return the list.", owner: row[owner]} for row in rows]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [*given, f"data.source={tmp_path / 'rows.jsonl'}", f"federation.num-clients={number}"]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_passes_the_check(
    name: str, words: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    check(words(name), on_bad_row="stop", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["run.name"] == name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])  # others run that
def test_a_recipe_runs_for_a_round(
    name: str, words: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"runtime": "local", "resume": False, "out": tmp_path, "on_bad_row": "", "as_json": True}
    run(words(name), **options)
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["rounds"]) == ("completed", 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_for_and_fits_the_schema(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    path = shipped_recipes()[name]
    assert first_comment(path).endswith(".")
    jsonschema.validate(read_recipe(path), recipe_schema())


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    recipes("")
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines() if line[:1].strip()][:-1] == NAMES
    recipes("keyboard")
    assert capsys.readouterr().out == (RECIPES / "keyboard.toml").read_text()
    with pytest.raises(ConfigError, match=r"no recipe 'absent'; there are .*keyboard"):
        recipes("absent")


@pytest.mark.parametrize("word", ["keyboard", "keyboard.toml", "own.yaml", "own.yml"])
def test_a_recipe_is_a_name_or_a_file(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("own.yaml", "own.yml"):
        (tmp_path / name).write_text("federation:\n  num-clients: 60\n")
    config = config_of([word, "seed=4"])
    assert (config.federation.num_clients, config.seed) == (60, 4)


def test_a_file_here_wins_over_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keyboard.toml").write_text("federation.num-clients = 3\n")
    assert config_of(["keyboard.toml"]).federation.num_clients == 3
    assert config_of(["keyboard"]).federation.num_clients == 60
    with pytest.raises(ConfigError, match="No such file"):  # never another one in its place
        config_of(["elsewhere/keyboard.toml"])
