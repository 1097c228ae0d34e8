"""`fedllm log verify`: is a log as it was written, and does it agree with the run folder around it?"""

import json
import sys
from collections import Counter
from pathlib import Path

import typer

from clients.gate import LOG
from fedllm.adapters.folder import WEIGHTS
from fedllm.chained_log import LogCheck, read_entries, verify
from fedllm.errors import ConfigError, IntegrityError
from fedllm.files import MANIFEST
from fedllm.runs.folder import DECISIONS, ROUNDS, read_rounds


def verify_log(path: Path, *, head: str, as_json: bool) -> None:
    """Print what an intact log holds; exit 1 and name the first bad line of another.

    Raises:
        ConfigError: there is no log.
    """
    log = _log_in(path)
    try:
        check = verify(log, head)
        if log.name == DECISIONS:
            _check_folder(log)
    except (IntegrityError, ConfigError) as error:  # one of the log, one of the files around it
        if as_json:
            print(json.dumps({"log": str(log), "intact": False, "reason": str(error)}))
        else:
            print(f"fedllm: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    kinds = Counter(str(entry.get("event") or entry.get("question")) for entry in read_entries(log))
    if as_json:
        found = {"intact": True, "lines": check.num_lines, "digest": check.head, "torn_bytes": check.num_torn}
        print(json.dumps({"log": str(log), **found, "kinds": kinds}))
    else:
        _print(log, check, kinds)


def _log_in(path: Path) -> Path:
    """Return a log's file: a run folder has one, and so has the state folder of a site."""
    for file in (path, path / DECISIONS, path / LOG):
        if file.is_file():
            return file
    raise ConfigError(f"{path}: neither a log nor a folder with {DECISIONS} or {LOG}")


def _check_folder(log: Path) -> None:
    """Compare the log of a run with the files around it, where they are there.

    Raises:
        IntegrityError: a round or the published weights are not those that the log has.
    """
    rounds, manifest, weights = log.parent / ROUNDS, log.parent / "adapter" / MANIFEST, ""
    logged = set()
    for entry in read_entries(log):
        if entry["event"] == "round":
            logged.add((entry["round"], entry["adapter"]))
        weights = entry["weights"] if entry["event"] == "published" else weights
    for record in read_rounds(log.parent) if rounds.exists() else ():
        if (record.round_num, record.adapter) not in logged:
            raise IntegrityError(f"{rounds}: round {record.round_num} is not the one in {log}")
    try:
        found = json.loads(manifest.read_text())["sha256"][WEIGHTS] if manifest.exists() else weights
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{manifest}: damaged") from None
    if weights and found != weights:
        raise IntegrityError(f"{manifest.parent / WEIGHTS}: not the weights whose publication {log} has")


def _print(log: Path, check: LogCheck, kinds: Counter[str]) -> None:
    print(f"{log}: {check.num_lines} lines, none changed")
    print("  " + ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()))
    if check.num_torn:
        print(f"  {check.num_torn} bytes of a line that was never finished; the next entry replaces them")
    print(f"  digest of the last line: {check.head}")
    print("  Note it elsewhere: `fedllm log verify --head DIGEST` then finds out whether lines were cut.")
