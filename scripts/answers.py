"""What base model and adapter answer to a run's public prompts."""

from dataclasses import dataclass
from pathlib import Path

from clients.process import PROCESS
from fedllm.adapters.folder import load_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import mapped_columns
from fedllm.errors import FedLLMError
from fedllm.plan.run_plan import resolve


@dataclass(frozen=True)
class Answers:
    """What the base model and the tuned one say to the same public prompts."""

    prompts: list[str]
    before: list[str]
    after: list[str]


def compare_answers(config: RunConfig, adapter: Path) -> Answers:
    """Return the greedy answers of base and adapter to the run's public prompts.

    Where the rows are plain text the prompts are beginnings of texts, and the answers how they go on.
    """
    prompts, length = list(resolve(config).prompts), config.evaluation.max_new_tokens
    if not prompts or not length:
        return Answers([], [], [])
    state = load_adapter(adapter, made_here=True).state
    engine = PROCESS.resident.engine(config.model, state.layout, config.train.token_budget)
    base, number = initial_adapter(state.layout, config.seed), len(prompts)
    answers = engine.generate(
        [base] * number + [state] * number, prompts * 2, length, as_plain_text=is_plain_text(config)
    )
    return Answers(prompts, answers[:number], answers[number:])


def is_plain_text(config: RunConfig) -> bool:
    """Return whether the rows of a run are plain text, so that its prompts are to be continued."""
    try:
        rows = [row for client in PROCESS.read_source(config).clients for row in client.train]
    except FedLLMError:  # they are on other machines: only the names of their columns tell
        return "text" in mapped_columns(config.data.columns)
    return bool(rows) and not any(row.turns for row in rows)
