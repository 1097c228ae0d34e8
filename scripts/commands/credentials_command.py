"""`fedllm keys server | node | admit`: what Flower's processes prove themselves with."""

from collections.abc import Sequence
from pathlib import Path

from fedllm.errors import ConfigError
from scripts.deploying.certificates import Credentials, new_credentials, new_node_key
from scripts.runtimes.processes import Link, register


def server(folder: Path, names: Sequence[str]) -> None:
    """Make or renew the server's certificate, and say which file goes where."""
    made = new_credentials(folder.expanduser().absolute(), names)
    print(f"{made.certificate}: the server's certificate, for {', '.join(names)}; again in a year renews it")
    print(f"{made.authority}: give it to every site, by a way that nobody can change it on")
    print(f"{made.authority_key}: keep it off the server; only the next certificate needs it")


def node(path: Path) -> None:
    """Make a node's key, and say which half goes to the server."""
    path = path.expanduser().absolute()
    print(f"{path}: this node's key: it never leaves this machine\n{new_node_key(path)}: for the server")


def admit(public: Path, *, credentials: Path, port: int) -> None:
    """Admit a node's key at the SuperLink of this machine."""
    own = Credentials(credentials.expanduser().absolute())
    if not own.authority.exists():
        raise ConfigError(
            f"--credentials {credentials}: no {own.authority.name} there; see `fedllm keys server`"
        )
    register(Link(own.folder, port, own), public)
    print(f"{public}: admitted")
