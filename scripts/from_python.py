"""What `fedllm.run` does: the run of a recipe with keys on top, and its summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.config.recipe import SUFFIXES, flatten
from fedllm.config.run_config import RunConfig
from scripts.commands.run_command import do_run
from scripts.console import Console
from scripts.recipe_arguments import config_of, shipped_recipes


def run(
    recipe: RunConfig | str | Path | None, keys: Mapping[str, Any], *, runtime: str, resume: bool
) -> Path:
    """Do a run and return its folder; raises as `scripts.commands.run_command.do_run`."""
    config = config_from(recipe, keys).override({"run.resume": resume})
    console = Console()
    folder, result = do_run(config, runtime, console)
    console.summary(folder, result)
    return folder


def config_from(recipe: RunConfig | str | Path | None, keys: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a recipe with `keys` on top, sections or dotted names.

    Raises:
        ConfigError: the recipe is absent, or a key or value is wrong.
    """
    flat = {name.replace("_", "-"): value for name, value in flatten(keys).items()}
    if isinstance(recipe, RunConfig):
        return recipe.override(flat)
    words = []
    if recipe is not None:
        name = str(recipe)
        words = [name if name in shipped_recipes() or name.endswith(SUFFIXES) else f"{name}.toml"]
    elif "data.source" in flat:  # then the quickstart's numbers do not fit
        words = [f"data.source={flat['data.source']}"]
    return config_of(words).override(flat)
