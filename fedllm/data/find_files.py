"""Finds the files that a data source names on this machine, and says in a line what it leaves out."""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedllm.data.formats import READERS
from fedllm.errors import DataError

ACCEPTED = f"{', '.join(READERS)} files"
GLOB_CHARACTERS = re.compile(r"[*?\[]")

_CURES = {
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".tgz", ".tar", ".7z"), "unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as .csv"),
}
# What `datasets` writes next to rows: descriptions, and caches of what was computed from the rows
_NO_ROWS = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow", re.IGNORECASE)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_OTHER_WORDS = {"", "data", "dataset", "set", "split", "rows"}
_NEVER_ROWS = "never rows"  # as .gitattributes: not worth a word
_logger = logging.getLogger("fedllm.data")


def find_files(source: str, split: str = "train") -> tuple[str, ...]:
    """Return the files that a path, folder, glob or comma-separated list of them names, each once.

    A folder is read with its subfolders where it holds no rows itself. Of files that are named as splits of a
    data set (`test.jsonl`, `test/a.parquet`, `test-00000-of-00001.parquet`) a folder or glob gives those of
    `split`. What a folder or glob leaves out is logged in a line.

    Raises:
        DataError: a part names nothing, a file of another kind, or other splits alone.
    """
    is_whole = os.path.exists(os.path.expanduser(source))  # a comma may be part of a name
    parts = [source] if is_whole else [part.strip() for part in source.split(",") if part.strip()]
    if not parts:
        raise DataError("data.source is empty; name a file, a folder, a glob, a hub data set or docstrings")
    return tuple(dict.fromkeys(file for part in parts for file in _files_of_part(part, split)))


def _files_of_part(part: str, split: str) -> list[str]:
    path = os.path.expanduser(part)
    if os.path.isdir(path):
        return _chosen(part, [os.path.join(path, name) for name in os.listdir(path)], split, root=path)
    if os.path.exists(path):
        if (suffix := Path(path).suffix.lower()) not in READERS:
            cure = f"{_CURES[suffix]}; " if suffix in _CURES else ""
            raise DataError(f"{part}: not a kind of file that is read; {cure}expected {ACCEPTED}")
        return [path]
    if first := GLOB_CHARACTERS.search(path):
        root = os.path.dirname(path[: first.start()])
        return _chosen(part, glob.glob(path, recursive=True), split, root=root or ".")
    raise DataError(f"{part}: no such file; data.source takes {ACCEPTED}, a folder or a glob of them")


def _chosen(part: str, entries: list[str], split: str, root: str) -> list[str]:
    """Return the files to read among the entries of a folder, or among what a glob below `root` matches."""
    is_folder = os.path.isdir(os.path.expanduser(part))
    folders = [entry for entry in entries if os.path.isdir(entry) and not _is_hidden(entry)]
    files = {entry: _why_not_read(entry) for entry in sorted(entries) if os.path.isfile(entry)}
    left_out = Counter({"subfolders": len(folders) if is_folder else 0})
    if "" not in files.values():  # no rows here, so they are further down: a snapshot of a data set
        below = sorted(file for folder in folders for file in _files_below(folder))
        files, left_out = files | {file: _why_not_read(file) for file in below}, Counter()
    left_out += Counter(why for file, why in files.items() if why and why != _NEVER_ROWS)
    rows = [file for file, why in files.items() if not why]
    splits = {file: _splits_of(Path(os.path.relpath(file, root))) for file in rows}
    wanted = {_SPLITS.get(name, name) for name in re.sub(r"\[.*?\]", "", split).split("+")}
    if any(named & wanted for named in splits.values()):  # then shards of any other name are a split too
        splits |= {file: _shard_name(file) for file, named in splits.items() if not named}
    kept = [file for file in rows if not splits[file] or splits[file] & wanted]
    if not kept and not is_folder:
        kept = rows  # a glob that itself names another split
    others = {name for file in rows if file not in kept for name in splits[file]}
    if others:
        left_out[f"of other splits ({', '.join(sorted(others))})"] = len(rows) - len(kept)
    told = ", ".join(f"{number} {what}" for what, number in sorted(left_out.items()))
    if not kept and rows:
        raise DataError(f"{part}: holds no split {split!r}, but {told}; set data.split or name the files")
    if not kept:
        why = f" ({told})" if told else ""
        raise DataError(f"{part}: holds or matches no file that is read{why}; expected {ACCEPTED}")
    if told:
        _logger.warning("%s: files read: %d; left out: %s", part, len(kept), told)
    return kept


def _why_not_read(file: str) -> str:
    suffix = Path(file).suffix.lower()
    if _is_hidden(file):
        return "hidden" if suffix in READERS else _NEVER_ROWS
    if _NO_ROWS.fullmatch(os.path.basename(file)):
        return "that describe a data set"
    if suffix in READERS:
        return ""
    return f"{suffix or 'without a suffix'}{f' ({_CURES[suffix]})' if suffix in _CURES else ''}"


def _is_hidden(path: str) -> bool:
    return os.path.basename(path).startswith(".")


def _files_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the files of a folder and its subfolders; a link that leads back up is not followed."""
    above = (*above, os.path.realpath(folder))
    for entry in os.scandir(folder):
        if entry.is_file():
            yield entry.path
        elif entry.is_dir() and not _is_hidden(entry.path) and os.path.realpath(entry.path) not in above:
            yield from _files_below(entry.path, above)


def _splits_of(path: Path) -> set[str]:
    """Return the names of the splits that a file belongs to by its name and by the folders of its path."""
    shard = _shard_name(path)
    name = next(iter(shard), path.stem)
    words = _words(name)
    # "train_sft-00000-of-00001" begins with its split, "my-test" ends with it
    ends = {*words[-1:], *(words[:1] if shard else ()), path.parent.name.lower()}
    found = {_SPLITS[word] for word in ends if word in _SPLITS}
    return found | shard if found and words else found


def _shard_name(path: str | Path) -> set[str]:
    """Return what a shard of a data set is named, such as `unsupervised`; nothing for other files."""
    shard = _SHARD.fullmatch(Path(path).stem)
    if shard and not _words(shard[1]):  # "train_sft/data-00000-of-00001.arrow", as `save_to_disk` writes
        return {Path(path).parent.name}
    return {shard[1]} if shard else set()


def _words(name: str) -> list[str]:
    return [word for word in re.split("[^a-z]+", name.lower()) if word not in _OTHER_WORDS]
