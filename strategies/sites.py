"""The server's list of admitted sites, `federation.sites`: whose key is whose, and the most each may bring.

[sites.north]
public-key = "ed25519:..."   # what `fedllm keys new` printed there
clients = ["anna", "ben"]    # the clients it may speak for, and nobody else; or
max-clients = 2              # how many, under names of its own (1 where both are left out)
max-rows = 5000              # most rows that they declare together
max-weight = 3000            # most that they weigh together in a round, in the unit of aggregation.weighting
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.data.partition import is_client_id
from fedllm.errors import ConfigError
from fedllm.files import read_toml
from fedllm.identity import is_public_text


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site that may take part; 0 is no limit of its own, no `clients` are names of its choice."""

    name: str
    public_key: str
    clients: tuple[str, ...] = ()
    max_clients: int = 1
    max_rows: int = 0
    max_weight: float = 0.0

    @property
    def most_clients(self) -> int:
        """How many clients it may have."""
        return len(self.clients) or self.max_clients


Sites: TypeAlias = Mapping[str, Site]  # by public key

_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "public-key": (
        lambda value: isinstance(value, str) and is_public_text(value),
        "the line that `fedllm keys new` printed at the site",
    ),
    "clients": (
        lambda value: (
            isinstance(value, list)
            and bool(value)
            and all(isinstance(name, str) and is_client_id(name) for name in value)
        ),
        "a list of client names",
    ),
    "max-clients": (lambda value: type(value) is int and value > 0, "a whole number from 1"),
    "max-rows": (lambda value: type(value) is int and value > 0, "a whole number from 1"),
    "max-weight": (lambda value: type(value) in (int, float) and 0 < value < 1e15, "a number above 0"),
}


def read_sites(named: str) -> Sites | None:
    """Return the admitted sites by key; None where `named` is empty, which admits any.

    Raises:
        ConfigError: the file cannot be read, or does not say for every site what it must.
    """
    if not named:
        return None
    path = Path(named).expanduser()
    try:
        values = read_toml(path)
    except OSError as error:
        raise ConfigError(f"federation.sites: {path}: cannot be read ({error.strerror})") from None
    tables = values.pop("sites", {})
    if values or not isinstance(tables, dict) or not tables:
        raise ConfigError(f"{path}: expected a table [sites.NAME] for each site, and nothing else")
    sites = [_site(f"{path}: [sites.{name}]", name, table) for name, table in tables.items()]
    for what, claimed in (
        ("public-key", [site.public_key for site in sites]),
        ("client", [client for site in sites for client in site.clients]),
    ):
        if twice := next((each for each in claimed if claimed.count(each) > 1), ""):
            raise ConfigError(f"{path}: {what} {twice} stands there twice")
    return {site.public_key: site for site in sites}


def _site(where: str, name: str, table: Any) -> Site:
    if not is_client_id(name):  # it is printed
        raise ConfigError(f"{where}: a site is named like a client, by letters, digits and the like")
    if not isinstance(table, dict) or "public-key" not in table:
        raise ConfigError(f"{where}: expected public-key, {_KINDS['public-key'][1]}")
    for key, value in table.items():
        if key not in _KINDS:
            close = difflib.get_close_matches(key, _KINDS, n=1)
            raise ConfigError(
                f"{where}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        is_allowed, wanted = _KINDS[key]
        if not is_allowed(value):
            raise ConfigError(f"{where}: {key} must be {wanted}")
    if {"clients", "max-clients"} <= table.keys():
        raise ConfigError(f"{where}: give clients or max-clients, not both")
    given: dict[str, Any] = {key.replace("-", "_"): value for key, value in table.items()}
    given["clients"] = tuple(given.get("clients", ()))
    return Site(name=name, **given)
