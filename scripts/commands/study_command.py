"""`fedllm study`: what joining brings to each client of a recipe, against training alone and pooling."""

import json
from collections.abc import Sequence
from pathlib import Path

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import resolve
from scripts.console import Console, shown_path
from scripts.recipe_arguments import config_of
from scripts.reporting.page import write_report
from scripts.studies.cells import Study, check_methods
from scripts.studies.doing import STUDY, do_in
from scripts.studies.findings import findings, study_tables

_AROUND = (1 / 3, 1.0, 3.0)  # rates tried, over the recipe's


def study(
    words: Sequence[str],
    *,
    methods: str,
    seeds: int,
    rates: str,
    jobs: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Do the study of the recipe that `words` describe and print what it found."""
    config = config_of(words)
    resolve(config)
    console = Console(quiet=as_json)
    wanted = Study(
        config.run.name,
        config,
        check_methods(_listed(methods), config),
        _rates(rates, config),
        tuple(config.seed + number for number in range(seeds)),
    )
    folder = out or Path("studies") / config.run.name
    result = do_in(folder, wanted, jobs, console.paragraph)
    page = write_report(folder)
    if as_json:
        print(json.dumps(result))
        return
    for table in study_tables(result):
        console.rich.print(table)
    for line in findings(result):
        console.paragraph(line, indent=0)
    console.line(f"study: {shown_path(folder / STUDY)}\nreport: {shown_path(page)}")


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _rates(words: str, config: RunConfig) -> tuple[float, ...]:
    """Return the learning rates of --rates; where none is given three around the recipe's.

    Raises:
        ConfigError: one is no positive number.
    """
    if not words:
        return tuple(float(f"{config.train.learning_rate * factor:.2g}") for factor in _AROUND)
    try:
        rates = tuple(sorted({float(word) for word in _listed(words)}))
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0:
        raise ConfigError(f"--rates {words}: expected positive numbers with commas between, as 3e-4,1e-3")
    return rates
