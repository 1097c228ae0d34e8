"""How an adapter came to be without a client or some of its rows, and what that guarantees.

`unlearning.json` in the folder of the run that unlearnt. The model card, the signed statement and the command
all say the sentence `guarantee`, so that nobody reads an approximation as an exact result.

    A  exact: the bits of a run that never had the client, by doing later rounds again without it
    B  bounded: the run was private for whole clients, so no adapter of it owes much to any one, and nothing
       is made anew: what its card says of its privacy is all there is to say
    C  exact by parts: every group of clients had an adapter, and one group was trained again (SISA,
       arXiv 1912.03817)
    D  approximate: the client's share was taken out of the finished adapter; measured, never guaranteed
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError
from fedllm.files import write_file
from fedllm.runs.folder import CHECKPOINTS, RESULT

UNLEARNING = "unlearning.json"  # in a run's folder
LIKE, UNLIKE, UNKNOWN = "like retraining", "unlike retraining", "not measurable"  # verdicts of a verification
_GUARANTEES = {
    "A": "exact (class A): the adapter has the bits of a run that never had what was unlearnt; rounds done"
    " again: {rounds}",
    "C": "exact by parts (class C): only the adapter of one group of clients had learnt it, and that group"
    " was trained again without it; rounds done again: {rounds}",
    "D": "approximate (class D, by {method}): no guarantee; {verified}",
}


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """What was unlearnt from a run, and how.

    `kind` is the class; `reason` says why no stronger one was possible. `parent` names the
    adapter before (`fedllm.runs.lineage.adapter_digest`).
    `verification` holds the verdict on every measure, empty where nobody has verified it
    (`scripts.unlearning.verify`).
    """

    kind: str  # A | C | D
    method: str  # replay | group | subtraction | ascent
    parent: str
    reason: str = ""
    rounds: int = 0  # done again
    seconds: float = 0.0
    verification: Mapping[str, str] = field(default_factory=dict)

    @property
    def guarantee(self) -> str:
        """What may be said of the adapter, in one sentence without a name."""
        values = {"rounds": self.rounds, "method": self.method, "verified": self._verified}
        return _GUARANTEES[self.kind].format(**values)

    @property
    def _verified(self) -> str:
        if not self.verification:
            return "nobody has compared it with a run that never had what was unlearnt"
        found = "; ".join(f"{name}: {verdict}" for name, verdict in self.verification.items())
        return f"against runs that never had what was unlearnt it is, by {found}"


def write_unlearning(folder: Path, unlearning: Unlearning) -> None:
    """Write `unlearning.json`; before the run is published, so that its card can say it.

    Raises:
        OSError: it could not be written.
    """
    values = asdict(unlearning)
    content = {"class": values.pop("kind"), "guarantee": unlearning.guarantee, **values}
    write_file(folder / UNLEARNING, json.dumps(content, indent=1, allow_nan=False) + "\n")


def clear_unfinished(folder: Path, parent: str) -> None:
    """Remove the checkpoint and adapter of a run that unlearns `parent` and was killed before its result.

    The same call can then be made again; a run that has finished stays as it is.
    """
    begun = read_unlearning(folder)
    if begun is not None and begun.parent == parent and not (folder / RESULT).exists():
        for name in (CHECKPOINTS, "adapter"):
            shutil.rmtree(folder / name, ignore_errors=True)


def read_unlearning(folder: Path) -> Unlearning | None:
    """Return what `write_unlearning` wrote; None for a run that has unlearnt nothing.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / UNLEARNING
    if not file.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        said, kind = values.pop("guarantee"), values.pop("class")
        found = Unlearning(kind=kind, **values)
        if said != found.guarantee:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: damaged ({type(error).__name__}); unlearn again") from None
    return found
