"""Which synthetic texts may be used, and why: a verdict for every text, kept in one file of the run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fedllm.errors import DataError
from fedllm.files import write_file

GATES = ("overlap", "duplicate", "membership")
FILE = "synthetic.json"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the three gates of a run say about one text: True passed, False refused, None not checked."""

    digest: str  # `tokens_digest` of the text
    overlap: bool | None  # not in any client's private text
    duplicate: bool | None = None  # no near copy of an earlier text, or of public text it must not repeat
    membership: bool | None = None  # no single client's adapter knows it far better than all others
    num_shingles: int = 0
    num_matched: int = 0  # the most that any node found in its private text
    verbatim: bool = False

    @property
    def passed(self) -> bool:
        """Whether the text may be used: no gate refuses it, and its overlap was checked."""
        return self.overlap is True and all(getattr(self, gate) is not False for gate in GATES)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where synthetic texts come from."""

    run: str
    round_num: int
    model: str
    fingerprint: str
    source: str  # what wrote them, such as "client adapters" or "base model"
    adapters: tuple[str, ...]  # digests of the adapters that wrote them
    seed: int
    temperature: float
    licence: str  # in the user's words; that of the base model binds too

    def __post_init__(self) -> None:
        if not self.licence.strip():
            raise DataError("synthetic text needs a licence: say under which terms it may be used")


@dataclass(frozen=True)
class Screening:
    """All verdicts on one set of synthetic texts."""

    provenance: Provenance
    verdicts: tuple[Verdict, ...]

    @property
    def pass_rates(self) -> Mapping[str, float | None]:
        """The share that each gate passes of the texts it checked, None where it checked none; and of all."""
        rates = {gate: _share([getattr(one, gate) for one in self.verdicts]) for gate in GATES}
        return MappingProxyType({**rates, "all": _share([one.passed for one in self.verdicts])})


def _share(flags: Sequence[bool | None]) -> float | None:
    known = [flag for flag in flags if flag is not None]
    return sum(known) / len(known) if known else None


def tokens_digest(tokens: Sequence[int]) -> str:
    """Return the SHA-256 of a text's token ids, as little-endian 32-bit numbers."""
    return hashlib.sha256(np.asarray(tokens, "<u4").tobytes()).hexdigest()


def write_screening(path: Path, screening: Screening) -> None:
    """Write verdicts, pass rates, licence and provenance as JSON, whole or not at all.

    `sha256` is the checksum of everything else with sorted keys: whoever uses the texts can tell whether a
    verdict was changed.
    """
    content = {
        "num_texts": len(screening.verdicts),
        "num_passed": sum(one.passed for one in screening.verdicts),
        "pass_rates": dict(screening.pass_rates),
        **asdict(screening),
    }
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    write_file(path, json.dumps({"sha256": checksum, **content}, indent=1) + "\n")
