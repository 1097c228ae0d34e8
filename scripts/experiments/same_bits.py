"""Whether two versions of this project train the same adapters, bit for bit.

A change of structure must not change a number. This runs twelve small federations (plain, private, SCAFFOLD,
personal adapters, FedSA, distillation, node sums, ...) with the code of one checkout, then with another's:

    python -m scripts.experiments same_bits FOLDER before --checkout OLD_CHECKOUT
    python -m scripts.experiments same_bits FOLDER after --against before

The second call prints a table and exits 1 where an adapter, a held-out loss or a vector that clients keep for
themselves differs. Private runs draw their noise from secrets in the run folder, so those of the first runs
are copied to the second ones before they start.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import load_file

from fedllm.adapters.folder import load_adapter
from scripts.benchmarks.models import save_tiny_model, write_rows
from scripts.command_line import command_of

ROOT = Path(__file__).parents[2]

COMMON = (
    *("federation.num-clients=4", "federation.num-rounds=3", "model.num-threads=1", "model.device=cpu"),
    *("lora.rank=4", "train.local-steps=2", "train.batch-size=2", "train.max-length=64"),
    *("evaluation.prompts=", "data.partition=column:client", "train.learning-rate=0.01"),
)
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "private rows": ("privacy.epsilon=8",),
    "private clients": ("privacy.epsilon=8", "privacy.unit=client"),
    "private updates": ("privacy.epsilon=8", "privacy.unit=client", "privacy.trust=local"),
    "scaffold": ("train.control-variates=true", "aggregation.read-out=factor-mean", "train.proximal=0.1"),
    "personal": ("personal.mode=ditto", "evaluation.every=1"),
    "fedsa": ("aggregation.preset=fedsa",),
    "fedex": ("aggregation.preset=fedex",),
    "distillation": (
        *("distill.when=last", "distill.num-texts=8", "distill.steps=2", "distill.max-tokens=48"),
        *("distill.originality=off", "distill.gate=public"),
    ),
    "node sums": ("wire.node-sum=true", "aggregation.read-out=factor-mean"),
    "robust": ("aggregation.robust=geometric-median", "aggregation.optimizer=fedadam", "lora.dropout=0.1"),
    "mixed ranks": ("lora.client-ranks=4,2", "wire.codec=int8", "federation.selection=power-of-choice"),
}


def run_all(folder: Path, label: str, checkout: Path, earlier: Path | None) -> None:
    """Run every federation with the code of `checkout`; its run folders lie in `folder`/`label`."""
    model, rows = folder / "model", folder / "rows.jsonl"
    # Older checkouts have their command in scripts/cli.py.
    command = "fedllm" if (checkout / "fedllm" / "__main__.py").exists() else "scripts.cli"
    if not model.exists():
        save_tiny_model(model)
        write_rows(rows, num_clients=4, rows_per_client=12)
    for name, changes in RUNS.items():
        run = folder / label / name
        shutil.rmtree(run, ignore_errors=True)
        if earlier is not None:
            _copy_secrets(earlier / name, run)
        words = (f"model.name={model}", f"data.source={rows}", *COMMON, *changes, f"run.name={name}")
        subprocess.run(
            [sys.executable, "-m", command, "run", *words, "--out", str(folder / label)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        print(f"{label}: {name}", file=sys.stderr)


def _copy_secrets(earlier: Path, run: Path) -> None:
    for secret in earlier.rglob("noise-secret"):
        target = run / secret.relative_to(earlier)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(secret, target)


def table(first: Path, second: Path) -> tuple[str, bool]:
    """Return how the runs of two labels compare, a row a run, and whether all are equal."""
    lines = [f"| run | adapter, loss, kept: {first.name} | {second.name} | equal |", "|---|---|---|---|"]
    all_equal = True
    for name in RUNS:
        found = [numbers_of(folder / name) for folder in (first, second)]
        all_equal &= found[0] == found[1]
        told = "yes" if found[0] == found[1] else "NO"
        lines.append(f"| {name} | {' | '.join(' '.join(numbers) for numbers in found)} | {told} |")
    return "\n".join(lines), all_equal


def numbers_of(run: Path) -> list[str]:
    """Return the adapter's digest, the held-out losses in full precision and a digest of what clients keep.

    Losses are those of the shared and of the personal adapters; what a run does not have is left out.
    """
    numbers = [f"`{load_adapter(run / 'adapter').state.digest[:12]}`"]
    held_out = json.loads((run / "result.json").read_text())["held_out"]
    after = held_out["after"] if held_out else {}
    numbers += [repr(losses["mean"]) for losses in (after, after.get("personal")) if losses]
    kept = sorted(run.glob("private/*/*/*.safetensors"))
    if kept:
        digest = hashlib.sha256()
        for file in kept:  # the names of two folders above differ by run and version, those below may not
            digest.update(f"{file.parent.name}/{file.name}".encode())
            for name, tensor in sorted(load_file(file).items()):
                digest.update(name.encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        numbers.append(f"`{digest.hexdigest()[:12]}`")
    return numbers


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be asked for."""

    folder: Annotated[Path, typer.Argument(help="Where models, rows and run folders go.")]
    label: Annotated[str, typer.Argument(help="A name for these runs.")]
    checkout: Annotated[Path, typer.Option(help="The code to run; this one where none is named.")] = ROOT
    against: Annotated[str, typer.Option(help="The label of earlier runs to compare with.")] = ""


def main(options: Options) -> None:
    """Run one side, and compare where a second one is named."""
    folder = options.folder.resolve()
    earlier = folder / options.against if options.against else None
    run_all(folder, options.label, options.checkout.resolve(), earlier)
    if earlier is not None:
        text, all_equal = table(earlier, folder / options.label)
        print(text)
        if not all_equal:
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(command_of(main))
