"""What a study costs, reckoned before it begins as `fedllm check` reckons a run."""

import os
from dataclasses import dataclass

from fedllm.config.run_config import RunConfig
from fedllm.models.base import choose_model, describe_layout, open_skeleton
from fedllm.plan.run_plan import resolve
from scripts.studies.cells import Study, budget_of
from scripts.studies.held_out import Clients
from scripts.work import Work, matrix_rate, memory_of, seconds_of, size_of, training_tokens

_LOOKS = 8  # passes over the held-out rows of a cell


@dataclass(frozen=True)
class Cost:
    """A study's cells, the tokens that each trains on at most, seconds of all, bytes of one process."""

    cells: int
    tokens: float
    seconds: float
    bytes: float


def cost_of(wanted: Study, clients: Clients) -> Cost:
    """Return what a study costs if none of its cells is done yet."""
    config, plan = wanted.config, resolve(wanted.config)
    trained = [method for method in wanted.methods if method != "base"]
    cells = len(trained) * (len(wanted.rates) + len(wanted.seeds) - 1)
    people = clients.holder.clients.values()
    rows = [len(row.tokens) for client in people for row in client.train]
    row_tokens = sum(rows) / max(1, len(rows))
    tokens = budget_of(config).steps * config.train.batch_size * row_tokens * len(people)
    held_out = sum(len(row.tokens) for client in people for row in client.held_out)
    chosen = choose_model(config.model)
    model = size_of(open_skeleton(chosen.files))
    work = Work(training_tokens(tokens) * cells, _LOOKS * held_out * cells, 0.0)
    return Cost(
        cells + len(wanted.seeds) * ("base" in wanted.methods),
        tokens,
        seconds_of(work, model, matrix_rate(chosen.device, chosen.dtype)),
        memory_of(plan, describe_layout(config.model, config.lora), model, chosen, row_tokens),
    )


def jobs_for(cost: Cost, config: RunConfig) -> int:
    """Return how many cells are done at once: one a core, as far as three quarters of the memory reach."""
    if choose_model(config.model).device.type != "cpu":
        return 1  # several on a GPU only keep each other waiting
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, cost.cells, int(0.75 * memory / cost.bytes)))
