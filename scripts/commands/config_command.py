"""`fedllm config`: what the keys of a run mean."""

import json
from itertools import groupby

from fedllm.config.key import Key
from fedllm.config.run_config import KEYS, RunConfig, nearest
from fedllm.config.schema import recipe_schema
from fedllm.errors import ConfigError
from fedllm.plan.capabilities import assigned
from scripts.console import Console


def config(name: str, *, json_schema: bool) -> None:
    """Print one key, the keys of a section, all of them, or the JSON schema of recipes.

    Raises:
        ConfigError: `name` is neither a key nor a section.
    """
    if json_schema:
        print(json.dumps(recipe_schema(), indent=1))
        return
    console = Console()
    if name in KEYS:
        _print_key(console, KEYS[name])
        return
    wanted = [key for key in KEYS.values() if not name or _section(key) == name]
    if not wanted:
        raise ConfigError(f"no key and no section {name!r}{nearest(name)}")
    for section, keys in groupby(wanted, key=_section):
        console.line(section or "run as a whole", style="bold")
        if section:
            console.paragraph(str(type(getattr(RunConfig(), section)).__doc__).splitlines()[0])
        for key in keys:
            console.line(f"  {assigned(key.name, key.default)}")
            console.paragraph(key.meaning, indent=6)
    console.line("\none key, with the values it takes: fedllm config KEY")


def _section(key: Key) -> str:
    return key.name.rpartition(".")[0]


def _print_key(console: Console, key: Key) -> None:
    console.line(assigned(key.name, key.default), style="bold")
    console.paragraph(key.meaning)
    console.paragraph(f"takes {key.allowed}")
    console.paragraph(
        "a resumed run may change it" if key.is_resumable else "a resumed run keeps the value it began with"
    )
