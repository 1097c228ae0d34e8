"""What this machine's owner permits, whatever a server asks.

The policy is a TOML file on the local machine: $FEDLLM_POLICY, else `~/.config/fedllm/policy.toml`.

    trust-remote-code = ["org/model"]     # models of the hub whose own Python code may run here;
                                          # for a local folder, "NAME@sha256:DIGEST of that code"
    server-paths = false                  # may a server name a local file as the data source?
    state-path = "/private/fedllm"        # where clients keep what never leaves; else the user's state folder
    max-epsilon = 8.0                     # only runs whose clients noise for themselves, up to this budget
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError
from fedllm.files import read_toml


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """A machine's own limits; the default permits nothing beyond fine-tuning."""

    trust_remote_code: tuple[str, ...] = ()
    server_paths: bool = False
    state_path: str = ""
    max_epsilon: float = 0.0  # 0 = runs without privacy too


# What each key may be, and how to say so.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "trust-remote-code": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of model names",
    ),
    "server-paths": (lambda value: isinstance(value, bool), "true or false"),
    "state-path": (lambda value: isinstance(value, str), "the name of a folder"),
    "max-epsilon": (lambda value: type(value) in (int, float) and value >= 0, "a number, 0 for no limit"),
}


def load_policy() -> SitePolicy:
    """Return this machine's policy; without $FEDLLM_POLICY an absent file is the default policy.

    Raises:
        ConfigError: the file cannot be read, is not TOML or holds an unknown key or a value of the wrong
            kind; or $FEDLLM_POLICY names none: what its owner wanted is not known.
    """
    named = os.environ.get("FEDLLM_POLICY")
    path = Path(named or "~/.config/fedllm/policy.toml").expanduser()
    try:
        values = read_toml(path)
    except FileNotFoundError:
        if named:
            raise ConfigError(f"$FEDLLM_POLICY names {path}, which does not exist") from None
        return SitePolicy()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    for name, value in values.items():
        if name not in _ALLOWED:
            raise ConfigError(f"{path}: unknown key {name!r}")
        is_allowed, wanted = _ALLOWED[name]
        if not is_allowed(value):
            raise ConfigError(f"{path}: {name} must be {wanted}")
    fields = {name.replace("-", "_"): value for name, value in values.items()}
    return SitePolicy(**{**fields, "trust_remote_code": tuple(values.get("trust-remote-code", ()))})
