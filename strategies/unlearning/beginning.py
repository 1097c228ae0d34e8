"""What a run began from: the adapter of an earlier run, which may know the client that is to be forgotten.

An adapter in `start/` is that of an earlier run where its weights are the same, and that run is looked for
beside the later one. What it knows of the client goes on into the later run; so it must have had no turn of
the client, or a run beside it must have forgotten the client exactly, from whose adapter the later run can
then begin again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.adapters.folder import WEIGHTS
from fedllm.errors import ConfigError
from fedllm.runs.folder import START
from fedllm.runs.lineage import adapter_digest
from fedllm.runs.unlearning import read_unlearning


@dataclass(frozen=True)
class Beginning:
    """What a run's first adapter knows of a client: nothing where both are empty.

    `refusal` says why no adapter without it can take its place, `instead` is the folder of one that can.
    `earlier` is the name of the run that it is from. The refusal is published and names no run: the name of a
    run may tell a client's.
    """

    refusal: str = ""
    instead: str = ""
    earlier: str = ""

    @property
    def knows(self) -> bool:
        """Whether the adapter may know the client."""
        return bool(self.refusal or self.instead)


def runs_beside(run: Path) -> tuple[Path, ...]:
    """Return the other runs in the folder of a run that have an adapter."""
    place = run.resolve()
    found = (file.parent.parent for file in sorted(place.parent.glob(f"*/adapter/{WEIGHTS}")))
    return tuple(other for other in found if other != place)


def beginning_of(run: Path, others: Sequence[Path], never_had: Callable[[Path], bool]) -> Beginning:
    """Return what the adapter that a run began from knows of a client.

    `others` are the runs to look among, and `never_had` says of a run whether its adapter is for certain that
    of a run without the client.

    Raises:
        ConfigError: what a run has unlearnt is damaged, or the weights of an adapter cannot be read.
    """
    if not (run / START).is_dir():
        return Beginning()
    began = _digest(run / START)
    earlier = next((other for other in others if _digest(other / "adapter") == began), None)
    if earlier is None:
        return Beginning(
            refusal="the run whose adapter it began from is not beside it, so nothing says whose it was"
        )
    if never_had(earlier):
        return Beginning()
    for other in others:
        forgotten = read_unlearning(other)
        if forgotten and (forgotten.kind, forgotten.parent) == ("A", began) and never_had(other):
            return Beginning(instead=str(other / "adapter"))
    refusal = "it began from the adapter of an earlier run, which had it: unlearn it from that one first"
    return Beginning(refusal, earlier=earlier.name)


def _digest(adapter: Path) -> str:
    try:
        return adapter_digest(adapter)
    except OSError as error:
        raise ConfigError(f"{adapter / WEIGHTS}: cannot be read ({error.strerror}); restore it") from None
