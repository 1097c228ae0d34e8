"""The data holders of a deployment on this machine: a SuperNode for each client, and a service for them all.

They are sites like any other (`scripts.runtimes.site`), by a site.toml that is made for the run.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedllm.config.run_config import RunConfig
from fedllm.files import read_toml
from fedllm.site_policy import load_policy
from scripts.deploying.certificates import new_node_key
from scripts.runtimes.machine import gpus_of
from scripts.runtimes.processes import Link, register
from scripts.runtimes.site import running_site


@contextmanager
def own_sites(link: Link, config: RunConfig, private: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Run the nodes of a run at a hardened SuperLink for the length of the block; what ends is started again.

    Where there are several GPUs each has a service of its own, and node i takes GPU i modulo their number.
    `private` is where the clients keep what is theirs, and `tell` hears what was started again.

    Raises:
        RunFailedError: the SuperLink refuses a node's key.
    """
    number, gpus = config.federation.num_clients, gpus_of(config)
    ended = threading.Event()
    with ExitStack() as stack:
        for place in range(max(1, min(len(gpus), number))):
            file = _write_site(link, private, place, range(place, number, max(1, len(gpus))), number)
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[place]} if gpus else {}
            site = stack.enter_context(running_site(load_policy(file), logs=link.folder, variables=gpu))
            tending = threading.Thread(target=site.tend, args=(tell, ended.is_set), daemon=True)
            tending.start()
            stack.callback(tending.join)
        stack.callback(ended.set)
        yield


def own_policy(private: Path) -> dict[str, Any]:
    """Return the tables of a site.toml for a run that this machine's owner starts.

    The owner names the data source, so the nodes may open it, and what clients keep for themselves lies where
    a resumed run finds it. What else the owner's own site.toml says of any run holds for this one too.
    """
    file = load_policy().file
    told = read_toml(file) if file else {}
    of_servers = ("servers", "bundles")  # of others than this run's own
    allowed = {key: value for key, value in told.get("allow", {}).items() if key not in of_servers}
    tables: dict[str, Any] = {
        "site": {"state-path": str(private)},
        "allow": {**allowed, "server-paths": True},
    }
    return tables | {name: told[name] for name in ("limits", "budget") if name in told}


def _write_site(link: Link, private: Path, place: int, nodes: range, number: int) -> Path:
    """Write the site.toml of some of the nodes, whose keys are made and admitted."""
    assert link.credentials
    shared = {"superlink": link.address, "root-certificates": str(link.credentials.authority)}
    tables = {}
    for index in nodes:
        key = link.folder / f"node-{index}.key"
        register(link, new_node_key(key))
        share = {"partition-id": index, "num-partitions": number}
        tables[str(index)] = {**shared, "private-key": str(key), **share}
    file = link.folder / f"site-{place}.toml"
    file.write_text(tomli_w.dumps({**own_policy(private), "nodes": tables}))
    return file
