"""The words after a command: a recipe and `key=value` overrides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.recipe import SUFFIXES, build_config, parse_overrides, read_recipe
from fedllm.config.run_config import RunConfig

RECIPES = Path(__file__).parent / "recipes"
QUICKSTART = "quickstart"


@dataclass(frozen=True)
class Request:
    """What a person asked for: the configuration, and where each key that was set was set."""

    config: RunConfig
    origins: Mapping[str, str]  # key -> the name of its recipe, or "command line"


def config_of(words: Sequence[str], extra: Sequence[str] = ()) -> RunConfig:
    """Return the configuration that `words` describe; raises as `request_of`."""
    return request_of(words, extra).config


def request_of(words: Sequence[str], extra: Sequence[str] = ()) -> Request:
    """Return what `words` ask for; without a recipe it is the quickstart.

    A recipe is a file or the name of a shipped one. The quickstart's numbers and prompts fit its own text:
    with another `data.source` and no recipe, every key not given has its default instead.

    Raises:
        ConfigError: the recipe is absent, or a key or value is wrong.
    """
    shipped = shipped_recipes()
    recipes = [word for word in words if word in shipped or (word.endswith(SUFFIXES) and "=" not in word)]
    overrides = [*(word for word in words if word not in recipes[:1]), *extra]
    recipe: Path | None = shipped[QUICKSTART]
    if recipes:
        named = Path(recipes[0])
        recipe = named if named.is_file() else shipped.get(recipes[0].removesuffix(".toml"), named)
    elif any(word.partition("=")[0].strip() == "data.source" for word in words):
        recipe = None
    config = build_config(recipe, overrides)
    by_recipe = dict.fromkeys(read_recipe(recipe), recipe.name) if recipe else {}
    return Request(config, {**by_recipe, **dict.fromkeys(parse_overrides(overrides), "command line")})


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with fedllm, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def first_comment(recipe: Path) -> str:
    """Return the first line of a recipe, which says what it is for."""
    return recipe.read_text().partition("\n")[0].removeprefix("# ")
