"""Who hears of a run besides the person who watches it: log, trackers, its lineage, kept withdrawals."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedllm.plan.run_plan import RunPlan
from strategies.decisions import decided
from strategies.lineage import noting_clients
from strategies.session import Watch
from strategies.tracking import tracked
from strategies.withdrawals import keeping_withdrawals


@contextmanager
def heard(folder: Path, plan: RunPlan, watch: Watch, given: Sequence[str] = ()) -> Iterator[Watch]:
    """Yield `watch` with the ears of all of them; raises as `decided` and `tracked`."""
    with decided(folder, plan, watch, given) as watch, tracked(folder, plan.config, watch) as watch:
        yield noting_clients(folder, plan, keeping_withdrawals(folder, watch))
