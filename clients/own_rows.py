"""Which of a node's own rows are held out: a secret of the site's decides, whatever run or server asks.

A row is known by its place, so it stays on its side in every run: neither the run's seed nor its columns,
limits or other rows move it. A server that could choose would hold out one row at a time and measure it.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from clients.site import NodeConfig, data_path_of
from fedllm.data.shards import OwnSplit, Place
from fedllm.errors import CheckpointError
from fedllm.files import make_private_folder, write_file
from fedllm.privacy.data_budget import budget_folder
from fedllm.privacy.keys import derived_key, kept_secret
from fedllm.site_policy import load_policy

SHARE = 10  # one row in so many is held out, where the owner names no number
_NOTE = "held-out.json"


def own_split(node: NodeConfig) -> OwnSplit | None:
    """Return how a site splits a node's own rows; None without a site.toml, where the run's seed does."""
    data_path, policy = data_path_of(node), load_policy()
    if data_path is None or policy.file is None:
        return None
    wanted = int(node.get("held-out-rows", 0))
    choose = partial(held_out_places, policy.state_folder, data_path, wanted)
    return OwnSplit(choose, hides=bool(policy.budget.epsilon))


def held_out_places(state: Path, data_path: Path, wanted: int, places: Sequence[Place]) -> set[Place]:
    """Return the places that are held out: `wanted` of those of the first use, 0 = one in ten of them.

    Rows that come later are held out in the same share.

    Raises:
        CheckpointError: the secret or the note of the first use cannot be kept.
    """
    secret = kept_secret(state / "split-secret")
    names = {file: os.path.relpath(Path(file).resolve(), data_path) for file, _ in places}
    order = {place: derived_key(secret, "held out", names[place[0]], place[1]) for place in places}
    bound = _bound(budget_folder(state, data_path) / _NOTE, wanted, sorted(order.values()))
    return {place for place, key in order.items() if key.hex() <= bound}


def _bound(note: Path, wanted: int, keys: Sequence[bytes]) -> str:
    """Return the key (hex) up to which a row is held out, as noted at the first use for this number."""
    try:
        noted = json.loads(note.read_text()) if note.exists() else {}
        if noted.get("rows") == wanted:
            return str(noted["bound"])
        number = min(wanted or max(1, len(keys) // SHARE), len(keys) - 1)  # one at least is trained on
        bound = keys[number - 1].hex() if number > 0 else ""
        make_private_folder(note.parent)
        write_file(note, json.dumps({"rows": wanted, "bound": bound}))
        return bound
    except (OSError, ValueError, KeyError, AttributeError):
        raise CheckpointError(
            f"{note}, which says what rows are held out, cannot be kept or is damaged; restore it, and let"
            " this user write there"
        ) from None
