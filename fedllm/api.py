"""fedllm from Python: `fedllm.run(...)` does what the command `fedllm run` does, and returns what came of it.

    result = fedllm.run("quickstart", federation={"num_rounds": 1})
    result.losses["adapter"]

What it calls is imported by name: this package knows nothing of `scripts`, where the command lives.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from fedllm.runs.folder import RESULT, read_rounds
from fedllm.runs.records import RoundRecord
from fedllm.siblings import own_packages


@dataclass(frozen=True)
class Result:
    """What is in the folder of a finished run; `Result(Path("runs/demo"))` opens one of before."""

    folder: Path

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, which PEFT loads."""
        return self.folder / "adapter"

    @property
    def summary(self) -> dict[str, Any]:
        """The content of `result.json`: how the run ended, losses, answers before and after, warnings.

        Raises:
            ConfigError: there is none; the run goes on, was killed, or is none.
        """
        try:
            found: dict[str, Any] = json.loads((self.folder / RESULT).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.folder}: no run that has ended ({RESULT}: {type(error).__name__})"
            ) from None
        return found

    @property
    def records(self) -> list[RoundRecord]:
        """What every round did; the first is the base model before any training."""
        return read_rounds(self.folder)

    @property
    def losses(self) -> dict[str, dict[str, float]]:
        """Held-out loss of every client, in nats per token, in the columns that the run measured.

        "base" and "adapter" are before and after the run, "personal" is with a personal adapter on top; with
        `personal.mode = finetune` also "alone", "shared" and "home", all three on other rows than the first.
        """
        summary = self.summary
        ends, at_home = summary.get("held_out", {}), summary.get("at_home", {}).get("clients", {})
        columns = {"base": ends.get("before", {}), "adapter": ends.get("after", {})}
        columns["personal"] = columns["adapter"].get("personal", {})
        found = {name: part.get("clients", {}) for name, part in columns.items()}
        for name in ("alone", "shared", "home"):
            found[name] = {client: told[name] for client, told in at_home.items()}
        return {name: losses for name, losses in found.items() if losses}

    def plot(self, path: str | Path | None = None) -> Path:
        """Draw the clients' losses over the rounds, by default into losses.svg in the run folder."""
        target = Path(path or self.folder / "losses.svg")
        return _called("scripts.reporting.page", "plot_losses", self.folder, target)

    def report(self) -> Path:
        """Write the page of the run, report.html in its folder, and return where it is."""
        return _called("scripts.reporting.page", "write_report", self.folder)


def run(
    recipe: RunConfig | str | Path | None = None,
    *,
    runtime: str = "local",
    resume: bool = False,
    **keys: Any,
) -> Result:
    """Fine-tune, show the progress, and return the result. Its folder is where `fedllm run` would put it.

    `recipe` is the name of a shipped recipe, a file, a configuration, or None for what `fedllm run` takes
    alone. `keys` set values on top, a section each as in a recipe, with underscores for hyphens:
    `lora={"rank": 4}`; a dotted name works as well: `**{"lora.rank": 4}`. `runtime` and `resume` are as on
    the command line.

    Raises:
        FedLLMError: the run cannot start, or ended without a result; the message is one line.
    """
    words = {"runtime": runtime, "resume": resume}
    return Result(_called("scripts.from_python", "run", recipe, keys, **words))


def _called(module: str, name: str, *values: Any, **options: Any) -> Path:
    with own_packages():
        found: Path = getattr(import_module(module), name)(*values, **options)
    return found
