"""The words after a command: a recipe and `key=value` overrides."""

from collections.abc import Sequence
from pathlib import Path

from fedllm.config.recipe import build_config
from fedllm.config.run_config import RunConfig

RECIPES = Path(__file__).parent / "recipes"


def config_of(words: Sequence[str], extra: Sequence[str] = ()) -> RunConfig:
    """Return the configuration that `words` describe; without a recipe it is the quickstart.

    The quickstart's numbers and prompts fit its own text: with another `data.source` and no recipe, every
    key not given has its default instead.

    Raises:
        ConfigError: the recipe is absent, or a key or value is wrong.
    """
    recipes = [word for word in words if word.endswith(".toml") and "=" not in word]
    overrides = [word for word in words if word not in recipes[:1]]
    if not recipes and any(word.partition("=")[0].strip() == "data.source" for word in overrides):
        return build_config(None, [*overrides, *extra])
    recipe = Path(recipes[0]) if recipes else RECIPES / "quickstart.toml"
    if not recipe.is_file() and (RECIPES / recipe.name).is_file():
        recipe = RECIPES / recipe.name  # a shipped recipe by its bare name
    return build_config(recipe, [*overrides, *extra])
