"""The file of a pipeline, `pipeline.toml`: what it runs, when, and what a new adapter must show."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from fedllm.config.key import declared_key, key
from fedllm.errors import ConfigError
from fedllm.files import read_toml
from scripts.pipeline.gates import Limits

_Table = TypeVar("_Table")


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """[run]: what a run of the pipeline is."""

    recipe: str = key("", "the recipe of every run")
    runtime: str = key("local", "where its clients are", words="local simulation deployment")
    folder: str = key("pipeline", "folder of the pipeline's state and of its runs")


@dataclass(frozen=True, kw_only=True)
class RegistryTable:
    """[registry]: where versions go, and who signs them."""

    folder: str = key("registry/adapter", "the registry, a folder with the model's name")
    key: str = key("", "file of the key that signs new versions (`fedllm keys new`)")


@dataclass(frozen=True, kw_only=True)
class TriggerTable:
    """[trigger]: how often to look, and what starts a run."""

    look_minutes: float = key(60.0, "minutes between two looks at the clients", above=0)
    every_days: float | str = key("off", "days between two runs", words="off", above=0)
    new_rows: int | str = key("off", "rows that have come since the last run", words="off", at_least=1)
    drift: bool = key(True, "a client's held-out loss has drifted")


@dataclass(frozen=True, kw_only=True)
class DriftTable:
    """[drift]: when a rise of a client's loss is an alarm."""

    looks_between_alarms: float = key(
        1000.0, "looks at all clients for one false alarm", above=1, at_most=1e9
    )
    least: float = key(0.02, "nats per token that count as one deviation at least", above=0)


@dataclass(frozen=True, kw_only=True)
class MetricsTable:
    """[metrics]: figures for Prometheus."""

    file: str = key("", "an OpenMetrics file that is written after every look; empty = none")


_TABLES: dict[str, Any] = {
    "run": RunTable,
    "registry": RegistryTable,
    "trigger": TriggerTable,
    "drift": DriftTable,
    "gates": Limits,
    "metrics": MetricsTable,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole file, table by table; relative paths begin at the folder of the file."""

    file: Path
    run: RunTable
    registry: RegistryTable
    trigger: TriggerTable
    drift: DriftTable
    gates: Limits
    metrics: MetricsTable

    def path(self, named: str) -> Path:
        """Return a path that the file names."""
        return (self.file.parent / Path(named).expanduser()).resolve()


def read_settings(file: Path) -> Settings:
    """Return the settings in a file.

    Raises:
        ConfigError: it cannot be read, names something unknown, or lacks the recipe or the key.
    """
    try:
        values = read_toml(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    for name in values.keys() - _TABLES.keys():
        raise ConfigError(f"{file}: unknown table [{name}]; there are {', '.join(_TABLES)}")
    tables = {name: _table(file, name, kind, values.get(name, {})) for name, kind in _TABLES.items()}
    settings = Settings(file=file.absolute(), **tables)
    for name, value in (("run.recipe", settings.run.recipe), ("registry.key", settings.registry.key)):
        if not value:
            raise ConfigError(f"{file}: {name} is missing; name a file")
    return settings


def _table(file: Path, name: str, kind: type[_Table], values: Any) -> _Table:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file}: {name} must be a table, [{name}]")
    known = {
        item.name.replace("_", "-"): declared_key(f"{name}.{item.name}".replace("_", "-"), item)
        for item in fields(kind)  # type: ignore[arg-type]
    }
    given = {}
    for leaf, value in values.items():
        if leaf not in known:
            raise ConfigError(f"{file}: unknown key {name}.{leaf}; there are {', '.join(known)}")
        try:
            typed = known[leaf].typed(value)
            known[leaf].check(typed)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        given[leaf.replace("-", "_")] = typed
    return kind(**given)
