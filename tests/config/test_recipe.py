from pathlib import Path

import pytest

from fedllm.config.recipe import build_config, parse_overrides, read_recipe
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve


def test_tables_and_dotted_keys_mean_the_same(tmp_path: Path) -> None:
    tables, dotted = tmp_path / "tables.toml", tmp_path / "dotted.toml"
    tables.write_text('seed = 3\n[lora]\nrank = 4\ntarget-modules = ["q_proj", "v_proj"]\n')
    dotted.write_text('seed = 3\nlora.rank = 4\nlora.target-modules = "q_proj,v_proj"\n')
    expected = RunConfig.from_flat({"seed": 3, "lora.rank": 4, "lora.target-modules": "q_proj,v_proj"})
    assert build_config(tables, []) == build_config(dotted, []) == expected
    assert RunConfig.from_flat(read_recipe(tables)).to_flat() == expected.to_flat()


def test_a_list_of_prompts_is_as_many_prompts(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('evaluation.prompts = ["Why, then?", "Who?"]\n')
    assert resolve(build_config(recipe, [])).prompts == ("Why, then?", "Who?")


def test_overrides_win_and_may_hold_equals_signs(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("lora.rank = 4\nseed = 1\n")
    config = build_config(recipe, ["lora.rank=16", " run.resume = TRUE ", "evaluation.prompts=a=b || c"])
    assert (config.lora.rank, config.seed, config.run.resume) == (16, 1, True)
    assert config.evaluation.prompts == "a=b || c"
    assert build_config(None, []) == RunConfig()
    assert parse_overrides([]) == {}


@pytest.mark.parametrize("word", ["train.local-steps", "", "--resume"])
def test_a_word_that_sets_no_key_is_one_line(word: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_overrides([word])


@pytest.mark.parametrize("content", [b"lora.rank = ", b"[lora", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_recipe_that_is_no_toml_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.toml: not a TOML file") as caught:
        read_recipe(tmp_path / "recipe.toml")
    assert "\n" not in str(caught.value)


def test_an_absent_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    "line", ["lora = 3", "[[lora]]\nrank = 3", "seed.x = 1", "lora.rank.x = 1", "seed = 2020-01-01"]
)
def test_a_recipe_of_another_shape_is_a_config_error(line: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        build_config(tmp_path / "recipe.toml", [])
    assert "\n" not in str(caught.value)


def test_lines_may_end_as_windows_ends_them(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"[lora]\r\nrank = 4\r\n")
    assert read_recipe(tmp_path / "recipe.toml") == {"lora.rank": 4}


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbf[lora]\r\nrank = 3\r\n")
    assert read_recipe(tmp_path / "recipe.toml") == {"lora.rank": 3}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_a_recipe_in_another_encoding_names_the_cure(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes('run.name = "müller"\n'.encode(encoding))
    with pytest.raises(ConfigError, match=r"recipe\.toml: .*save it as UTF-8"):
        read_recipe(tmp_path / "recipe.toml")


def test_a_key_of_numbers_and_words_takes_either(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('federation.cohort = 0.5\ntrain.clip-norm = "off"\nseed = 1\n')
    config = build_config(tmp_path / "recipe.toml", ["model.num-threads=2", "data.max-rows=all"])
    assert (config.federation.cohort, config.train.clip_norm) == (0.5, "off")
    assert (config.model.num_threads, config.data.max_rows) == (2, "all")


def test_yaml_and_toml_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'seed = 3\nrun.resume = true\nlora.target-modules = ["q_proj", "v_proj"]\n'
        'train.learning-rate = 2e-3\ntrain.clip-norm = "off"\ndata.max-rows = "all"\nrun.name = "2026"\n'
    )
    (tmp_path / "recipe.yaml").write_text(
        "seed: 3\nrun: {resume: true, name: 2026}\nlora:\n  target-modules:\n  - q_proj\n  - v_proj\n"
        "train:\n  learning-rate: 2e-3\n  clip-norm: off\ndata.max-rows: all\n"
    )
    (tmp_path / "empty.yml").write_text("# nothing\n")
    assert build_config(tmp_path / "recipe.yaml", []) == build_config(tmp_path / "recipe.toml", [])
    assert read_recipe(tmp_path / "empty.yml") == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("lora: [", "not a YAML file"),
        ("seed: 1\nseed: 2", "a key is there twice"),
        ("a: &a\n  b: *a", "refers to itself"),
        ("just words", "expected keys with values"),
        ("seed: 1\n---\nseed: 2", "not a YAML file"),
        ('run.name: "müller"', "save it as UTF-8"),
    ],
)
def test_a_recipe_that_is_no_yaml_is_one_line(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=says) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_yaml_key_without_a_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run:\n  name:\n")
    with pytest.raises(ConfigError, match=r"run\.name"):
        build_config(tmp_path / "recipe.yaml", [])
