"""What this machine's owner permits, whatever a server asks.

The policy is a TOML file on the local machine: $FEDLLM_POLICY, else `~/.config/fedllm/policy.toml`.

    trust-remote-code = ["org/model"]     # models whose own Python code may run here
    server-paths = false                  # may a server name a local file as the data source?
    state-path = "/private/fedllm"        # where clients keep what never leaves; else the user's state folder
    max-epsilon = 8.0                     # only runs whose clients noise for themselves, up to this budget
"""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """A machine's own limits; the default permits nothing beyond fine-tuning."""

    trust_remote_code: tuple[str, ...] = ()
    server_paths: bool = False
    state_path: str = ""
    max_epsilon: float = 0.0  # 0 = runs without privacy too


def load_policy() -> SitePolicy:
    """Return this machine's policy; without $FEDLLM_POLICY an absent file is the default policy.

    Raises:
        ConfigError: the file cannot be read, is not TOML or holds an unknown key or a value of the wrong
            kind; or $FEDLLM_POLICY names none: what its owner wanted is not known.
    """
    named = os.environ.get("FEDLLM_POLICY")
    path = Path(named or "~/.config/fedllm/policy.toml").expanduser()
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if named:
            raise ConfigError(f"$FEDLLM_POLICY names {path}, which does not exist") from None
        return SitePolicy()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file ({type(error).__name__})") from None
    unknown = values.keys() - {"trust-remote-code", "server-paths", "state-path", "max-epsilon"}
    if unknown:
        raise ConfigError(f"{path}: unknown key {sorted(unknown)[0]!r}")
    models, paths = values.get("trust-remote-code", []), values.get("server-paths", False)
    if not isinstance(models, list) or not all(isinstance(m, str) for m in models):
        raise ConfigError(f"{path}: trust-remote-code must be a list of model names")
    if not isinstance(paths, bool):
        raise ConfigError(f"{path}: server-paths must be true or false")
    state_path = values.get("state-path", "")
    if not isinstance(state_path, str):
        raise ConfigError(f"{path}: state-path must be the name of a folder")
    epsilon = values.get("max-epsilon", 0.0)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not epsilon >= 0:
        raise ConfigError(f"{path}: max-epsilon must be a number, 0 for no limit")
    return SitePolicy(
        trust_remote_code=tuple(models),
        server_paths=paths,
        state_path=state_path,
        max_epsilon=float(epsilon),
    )
