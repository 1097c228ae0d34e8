"""Where the parts of a registry are, in its folder."""

from pathlib import Path

LOG, HEAD, LOCK = "log.jsonl", "head", ".registry.lock"
ALIASES, LINEAGE = "aliases", "lineage"


def folder_name(number: int) -> str:
    """Return the name of a version's folder, which is what an alias holds too."""
    return f"{number:04d}"


def lineage_file(folder: Path, number: int) -> Path:
    """Return where the lineage of a version's run is kept, with the names of its clients."""
    return folder / LINEAGE / f"{folder_name(number)}.json"
