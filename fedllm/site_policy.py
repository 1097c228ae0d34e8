"""What this machine's owner permits, whatever a server asks: `site.toml`, the one file of a data holder.

It is the file that $FEDLLM_SITE names, else `~/.config/fedllm/site.toml`; an empty $FEDLLM_SITE names none.
All of it may be left out, and without it nothing is limited beyond the defaults below (docs/site.md). In
[limits] and [budget] a 0 means no limit; an empty list of [allow] means any, but for `trust-remote-code`.
Relative paths begin at the file's own folder.
"""

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_state_path

from fedllm.errors import ConfigError, PolicyError
from fedllm.files import read_toml
from fedllm.identity import is_public_text

# What a server may ask, by name.
MESSAGES = ("join", "train", "unmask", "evaluate", "overlap", "adapt", "stock")
_Table = TypeVar("_Table")


def _one_of(*words: str) -> Any:
    return field(default=words[0], metadata={"words": words})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """[site]: where things lie on this machine, and who runs them."""

    state_path: str = ""  # what never leaves: secrets, ledgers, the log; else the user's state folder
    socket: str = ""  # of the site service; else in a temporary folder
    data_root: str = ""  # every `data` of a node lies below it
    key: str = ""  # the site's Ed25519 key
    user: str = ""  # whom the service runs as; else who started it
    node_user: str = ""  # whom the nodes run as
    idle_minutes: float = 30.0  # after which the base model is unloaded
    keep_days: float = 0.0  # for which an ended run's private vectors stay; 0 = for good


@dataclass(frozen=True, kw_only=True)
class SiteNode:
    """[nodes.NAME]: one SuperNode, and the rows it answers for."""

    superlink: str = ""  # host:port of the server
    root_certificates: str = ""
    private_key: str = ""  # Flower's, which proves the node to the SuperLink
    data: str = ""  # its own rows; else its share of the run's `data.source`
    partition_id: int = 0
    num_partitions: int = 1
    client_id: str = ""  # else NAME
    model_path: str = ""  # this machine's copy of the base model
    max_rank: int = 0  # 0 = any
    held_out_rows: int = 0  # 0 = one row in ten
    server_paths: bool = False


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """[allow]: who may ask what, and what may leave."""

    models: tuple[str, ...] = ()  # "sha256:DIGEST" of all files of a base model
    trust_remote_code: tuple[str, ...] = ()  # hub ids, or "NAME@sha256:DIGEST" of a folder's code
    bundles: tuple[str, ...] = ()  # SHA-256 of the code that a server ships
    servers: tuple[str, ...] = ()  # host:port
    server_paths: bool = False  # may a server name files of this machine?
    messages: tuple[str, ...] = field(default=(), metadata={"words": MESSAGES})
    purposes: tuple[str, ...] = ()  # of `run.purpose`
    exact_numbers: bool = True  # else losses and counts leave coarse or not at all
    secure_aggregation: str = _one_of("off", "required")
    min_parties: int = 0  # fewest of a secret sum, where a run would do with fewer

    @property
    def bundle_digests(self) -> tuple[str, ...]:
        """The bundles by their digest alone; they may be written "sha256:DIGEST", as models are."""
        return tuple(name.removeprefix("sha256:").lower() for name in self.bundles)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """[limits]: the most of one answer, of one run, and in a period; and the fewest rows behind an answer."""

    steps: int = 0  # optimizer steps of a client in one answer
    run_steps: int = 0  # in all rounds of a run together
    tokens: int = 0  # of one answer: what is trained on or measured
    rank: int = 0
    seconds: float = 0.0  # of one answer
    rounds: int = 0  # answers to train requests in one run, repeated ones included
    train_rows: int = 0  # fewest rows that one answer is trained on
    held_out_rows: int = 0  # fewest rows that a held-out loss is the mean of
    period_days: float = 30.0  # for the three below, over all runs and servers
    evaluations: int = 0
    overlaps: int = 0
    runs: int = 0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """[budget]: what all runs of all servers together may learn of one data set."""

    epsilon: float = 0.0
    delta: float = 1e-5
    unit: str = _one_of("example", "client")


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """[adapters]: which adapters may be loaded from a folder (docs/signing.md)."""

    signers: tuple[str, ...] = ()  # public keys: only what one of them has signed; none = any, unsigned too
    min_versions: Mapping[str, int] = field(default_factory=dict)  # by an adapter's name; older are refused


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """A machine's own limits; `file` is the site.toml they were read from, None without one.

    `peers` has the public keys of the sites with which this one takes part in a secret sum, by name.
    """

    site: Machine = Machine()
    nodes: Mapping[str, SiteNode] = field(default_factory=dict)
    allow: Allowed = Allowed()
    limits: Limits = Limits()
    budget: Budget = Budget()
    adapters: Adapters = Adapters()
    peers: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None

    @property
    def is_exact(self) -> bool:
        """Whether exact losses, counts and sizes may leave; under a budget they may not."""
        return self.allow.exact_numbers and not self.budget.epsilon

    @property
    def state_folder(self) -> Path:
        """Where this machine keeps what never leaves it."""
        return self.path(self.site.state_path) if self.site.state_path else user_state_path("fedllm")

    def path(self, named: str) -> Path:
        """Return a path of the file; a relative one begins at the file's folder."""
        beside = self.file.parent if self.file else Path()
        return beside / os.path.expanduser(named)

    def node_config(self, name: str) -> dict[str, bool | int | str]:
        """Return what a node of this site is started with (docs/site.md), under Flower's keys.

        Raises:
            PolicyError: there is no such node, or its data is outside the data root.
        """
        if name not in self.nodes:
            raise PolicyError(f"{self.file}: there is no [nodes.{name}]")
        node = self.nodes[name]
        config: dict[str, bool | int | str] = {
            "client-id": node.client_id or name,
            "server-paths": node.server_paths,
            "max-rank": node.max_rank,
            "held-out-rows": node.held_out_rows,
            "partition-id": node.partition_id,
            "num-partitions": node.num_partitions,
        }
        if node.data:
            config["data-path"] = str(self.data_path(name))
        if node.model_path:
            config["model-path"] = str(self.path(node.model_path))
        return config

    def data_path(self, name: str) -> Path:
        """Return where the rows of a node are: a file or a folder.

        Raises:
            PolicyError: it, or a file below it, is outside the data root.
        """
        data, said = self.nodes[name].data, f"{self.file}: nodes.{name}.data"
        if not self.site.data_root:
            return self.path(data)
        if Path(data).is_absolute() or ".." in Path(data).parts or data.startswith("~"):
            raise PolicyError(f"{said} = {data!r}: expected a path below [site] data-root, without '..'")
        found = self.path(self.site.data_root) / data
        self.check_below_root(found, said)
        return found

    def check_below_root(self, rows: Path, said: str) -> None:
        """Refuse rows that lie outside the data root, where there is one; a link is what it leads to.

        Raises:
            PolicyError: the file, or one that lies somewhere below the folder, leads out of it.
        """
        if not self.site.data_root:
            return
        root = self.path(self.site.data_root).resolve()
        for file in (rows, *(rows.rglob("*") if rows.is_dir() else ())):
            if not file.resolve().is_relative_to(root):
                raise PolicyError(f"{said}: {file} leads out of [site] data-root; put the rows below {root}")


# What a value of each type may be, and how to say so. TOML knows neither tuples nor a bound.
_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "text"),
    int: (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    float: (
        lambda value: type(value) in (int, float) and 0 <= value < math.inf,
        "a number from 0",
    ),
    tuple[str, ...]: (
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "a list of texts",
    ),
    Mapping[str, int]: (
        lambda value: (
            isinstance(value, dict) and all(type(item) is int and item > 0 for item in value.values())
        ),
        "a table of whole numbers from 1, by name",
    ),
}
_TABLES = {"site": Machine, "allow": Allowed, "limits": Limits, "budget": Budget, "adapters": Adapters}


def load_policy(file: Path | None = None) -> SitePolicy:
    """Return this machine's policy, from `file` or the one the environment names.

    Raises:
        ConfigError: the file cannot be read, is not TOML or holds an unknown key or a value of the wrong
            kind; or the one that is named does not exist, or one of an earlier release does: what its owner
            wanted is not known.
    """
    named = os.environ.get("FEDLLM_SITE")
    _refuse_earlier()
    if file is None and named == "":
        return SitePolicy()
    path = file or Path(named or "~/.config/fedllm/site.toml").expanduser()
    try:
        values = read_toml(path)
    except FileNotFoundError:
        if file is None and not named:
            return SitePolicy()
        raise ConfigError(f"{path}, where this site's policy should be, does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return _read(values, path.absolute())


def _read(values: Mapping[str, Any], file: Path) -> SitePolicy:
    known = (*_TABLES, "nodes", "peers")
    for name, table in values.items():
        if name not in known:
            raise ConfigError(f"{file}: unknown table [{name}]{_nearest(name, known)}")
        if not isinstance(table, Mapping):
            raise ConfigError(f"{file}: {name} must be a table, [{name}]")
    tables: dict[str, Any] = {
        name: _table(kind, values.get(name, {}), f"{file}: {name}") for name, kind in _TABLES.items()
    }
    nodes = {}
    for name, table in values.get("nodes", {}).items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{file}: nodes.{name} must be a table, [nodes.{name}]")
        nodes[name] = _table(SiteNode, table, f"{file}: nodes.{name}")
    peers = values.get("peers", {})
    for name, key in peers.items():
        if not isinstance(key, str) or not is_public_text(key):
            raise ConfigError(f"{file}: peers.{name} must be a site's public key, 'ed25519:...'")
    policy = replace(SitePolicy(**tables, file=file), nodes=nodes, peers=peers)
    _check_secure(policy)
    _check_signers(policy)
    for name, node in nodes.items():
        if policy.allow.servers and node.superlink not in policy.allow.servers:
            raise ConfigError(f"{file}: nodes.{name}.superlink is none of [allow] servers")
    if not 0 < policy.budget.delta < 1:
        raise ConfigError(f"{file}: budget.delta must be above 0 and below 1")
    if not policy.limits.period_days:  # nothing ever counts in a period of no length
        raise ConfigError(f"{file}: limits.period-days must be above 0")
    return policy


def _check_secure(policy: SitePolicy) -> None:
    """Refuse a file that leaves open what would make secret sums worth nothing, where it requires them."""
    is_required = policy.allow.secure_aggregation == "required"
    said = "allow.secure-aggregation = 'required'" if is_required else "[peers]"
    for is_needed, name, is_there, why in (
        (is_required, "allow.bundles", policy.allow.bundles, "a server's own code could send what it likes"),
        (is_required, "peers", policy.peers, "a server could be all other parties itself"),
        (
            is_required or policy.peers,
            "site.key",
            policy.site.key,
            "the other sites could not tell this one from a server",
        ),
    ):
        if is_needed and not is_there:
            raise ConfigError(f"{policy.file}: {said} needs {name}; without it {why}")


def _check_signers(policy: SitePolicy) -> None:
    """Refuse signers that are no keys, and versions that nobody vouches for."""
    if wrong := next((key for key in policy.adapters.signers if not is_public_text(key)), None):
        raise ConfigError(
            f"{policy.file}: adapters.signers: {wrong!r} is no public key, 'ed25519:...'; `fedllm keys show`"
            " prints that of a key file"
        )
    if policy.adapters.min_versions and not policy.adapters.signers:
        raise ConfigError(
            f"{policy.file}: adapters.min-versions needs adapters.signers; anybody could write a version"
        )


def _table(kind: Callable[..., _Table], values: Mapping[str, Any], where: str) -> _Table:
    """Return a table of the file as a value of `kind`, whose fields say what may stand there."""
    known = {item.name.replace("_", "-"): item for item in fields(kind)}  # type: ignore[arg-type]
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}{_nearest(name, known)}")
        checked[known[name].name] = _checked(known[name], value, f"{where}.{name}")
    return kind(**checked)


def _checked(item: "Field[Any]", value: Any, where: str) -> Any:
    is_allowed, wanted = _TYPES[item.type]
    words = item.metadata.get("words", ())
    told = f"{wanted}{', of ' if words else ''}{', '.join(words)}"
    if not is_allowed(value):
        raise ConfigError(f"{where} must be {told}")
    if words and not set(value if isinstance(value, list) else [value]) <= set(words):
        raise ConfigError(f"{where} must be {told}")
    return tuple(value) if isinstance(value, list) else value


def _refuse_earlier() -> None:
    """Refuse the file of an earlier release: it limited this machine, and nothing reads it any more."""
    old = Path("~/.config/fedllm/policy.toml").expanduser()
    found = "$FEDLLM_POLICY" if "FEDLLM_POLICY" in os.environ else str(old) if old.exists() else ""
    if found:
        raise ConfigError(
            f"{found} is not read any more: move its keys to site.toml ($FEDLLM_SITE, else"
            " ~/.config/fedllm/site.toml; docs/site.md says where each goes) and remove it"
        )


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if not close:  # the table that knows such a key
        leaf = name.replace("-", "_")
        close = [f"[{table}] {name}" for table, kind in _TABLES.items() if hasattr(kind(), leaf)]
    return f"; did you mean {close[0]!r}?" if close else ""
