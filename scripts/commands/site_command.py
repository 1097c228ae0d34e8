"""`fedllm site start`: a data holder's machine takes part, by its site.toml."""

from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.site_policy import load_policy
from scripts.console import Console
from scripts.runtimes.site import Site, account_of, running_site


def start(config: Path | None) -> None:
    """Run the service and the nodes of a site until a signal ends it.

    Raises:
        ConfigError: there is no site.toml, it names no node, or a user that cannot be used.
        PolicyError: a node's data is outside the data root.
    """
    policy, console = load_policy(config), Console()
    if policy.file is None:
        raise ConfigError("no site.toml: name it with --config, or in $FEDLLM_SITE (docs/site.md)")
    if not policy.nodes:
        raise ConfigError(f"{policy.file}: it has no [nodes.NAME], so this site would do nothing")
    with running_site(policy) as site:
        _introduce(site, console)
        site.tend(console.line)


def _introduce(site: Site, console: Console) -> None:
    console.line(f"service   {site.socket}")
    for name, node in site.policy.nodes.items():
        console.line(f"node      {name} -> {node.superlink}")
    console.line(f"logs      {site.logs}")
    owner, messenger = (account_of(name) for name in (site.policy.site.user, site.policy.site.node_user))
    if owner != messenger:
        names = [account.name or "this user" for account in (owner, messenger)]
        console.line(f"users     the service runs as {names[0]}, the nodes as {names[1]}")
        for name, node in site.policy.nodes.items():
            if node.data and messenger.may_read(rows := site.policy.data_path(name)):
                console.line(
                    f"warning   {names[1]} can read {rows}: leave its folder to the service's user alone"
                )
    else:
        console.line(
            "users     service and nodes run as one user, who can read rows and keys; set [site] user and"
            " node-user, and start this as root"
        )
