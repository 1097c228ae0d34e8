"""Whether two versions of this project train the same adapters, bit for bit.


A change of structure must not change a number. This runs eleven small federations (plain, private, SCAFFOLD,
personal adapters, FedSA, distillation, node sums, ...) with the code of one checkout, then with another's:

    python -m scripts.experiments.same_bits FOLDER before --checkout OLD_CHECKOUT
    python -m scripts.experiments.same_bits FOLDER after --against before

The second call prints a table and exits 1 where an adapter differs. Private runs draw their noise from
secrets
that are kept in the run folder, so those of the first runs are copied to the second ones before they start.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fedllm.adapters.folder import load_adapter
from scripts.benchmarks.models import save_tiny_model, write_rows

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
            [sys.executable, "-m", "fedllm", "run", *words, "--out", str(folder / label)],
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
    """Return how the adapters of two labels compare, a row a run, and whether all are equal."""
    lines, all_equal = [f"| run | {first.name} | {second.name} | equal |", "|---|---|---|---|"], True
    for name in RUNS:
        digests = [load_adapter(folder / name / "adapter").state.digest for folder in (first, second)]
        losses = [_held_out(folder / name) for folder in (first, second)]
        is_equal = digests[0] == digests[1] and losses[0] == losses[1]
        all_equal &= is_equal
        cells = [f"`{digest[:12]}` {loss}" for digest, loss in zip(digests, losses, strict=True)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {'yes' if is_equal else 'NO'} |")
    return "\n".join(lines), all_equal


def _held_out(run: Path) -> str:
    """Return the mean held-out loss after a run in full precision, "-" where its plan withholds it."""
    held_out = json.loads((run / "result.json").read_text())["held_out"]
    return repr(held_out["after"]["mean"]) if held_out else "-"


def main() -> None:
    """Run one side, and compare where a second one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where models, rows and run folders go")
    parser.add_argument("label", help="a name for these runs")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the code to run (default: this one)")
    parser.add_argument("--against", help="the label of earlier runs to compare with")
    given = parser.parse_args()
    folder = given.folder.resolve()
    earlier = folder / given.against if given.against else None
    run_all(folder, given.label, given.checkout.resolve(), earlier)
    if earlier is not None:
        text, all_equal = table(earlier, folder / given.label)
        print(text)
        sys.exit(not all_equal)


if __name__ == "__main__":
    main()
