"""What tests of distillation share: rows of four kinds of clients, cheap keys, sessions with other keys."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.plan.run_plan import distillation_of, resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import DistillationLosses, DistillationRecord, LossChange
from strategies.distillation.material import Material, Screen, make_material, pass_all
from strategies.distillation.public_text import open_public_text
from strategies.distillation.step import open_engine
from strategies.distillation.synthetic_text import writers_of
from strategies.distillation.teachers import ClientAdapter
from strategies.session import Session

FORMS = {
    "anna": "Return the {} of a {}.",
    "ben": "open every {} near my {}!",
    "cleo": "NEVER SORT {} BEFORE {}",
    "dora": "(raise) {} => {} (fails)",
}
NAMES = tuple(FORMS)
WORDS = ("sum", "list", "file", "value", "error", "string", "number", "line", "index", "key", "name", "order")

CHEAP = {
    "distill.when": "every",
    "distill.num-texts": 24,
    "distill.max-tokens": 48,
    "distill.steps": 20,
    "distill.batch-size": 4,
    "distill.learning-rate": 0.005,
    "distill.top-k": 64,
    "distill.gate": "public",
    "distill.originality": "off",  # so few words make every sentence one that somebody has
}
FEW = {"distill.num-texts": 8, "distill.steps": 3, "train.local-steps": 4}
PRIVATE = {
    "privacy.epsilon": 8.0,
    "privacy.unit": "client",
    "privacy.trust": "local",
    "aggregation.read-out": "factor-mean",
}
LOSSES = DistillationLosses(base=4.0, ensemble=2.0, held_out=LossChange(3.0, 2.5))
STEP = DistillationRecord(kept=True, reason="the held-out public loss improved", losses=LOSSES)


def write_rows(path: Path, number: int, first: int) -> str:
    """Write rows of four clients who have learnt to answer in four ways."""
    lines = []
    for client, form in FORMS.items():
        for row in range(first, first + number):
            words = WORDS[row % 12], WORDS[(row // 12 + 5 * row + 1) % 12]
            line = {"instruction": f"{words[0]} {words[1]}?", "output": form.format(*words), "client": client}
            lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return str(path)


def steps_of(state: ServerState) -> list[DistillationRecord]:
    """Return the records of a run's distillation steps."""
    return [record.distillation for record in state.records if record.distillation]


def with_keys(session: Session, **flat: Any) -> Session:
    """Return a session that distils cheaply, with other keys than its nodes were given."""
    plan = resolve(session.config.override({**CHEAP, **flat}))
    return replace(session, plan=replace(plan, digest=session.plan.digest))  # nodes refuse another digest


def with_public(session: Session, source: str, **flat: Any) -> Session:
    """Return a session that distils on a text."""
    changed = with_keys(session, **{"distill.text": source, **flat})
    public = open_public_text(changed.plan.distillation, changed.config.data)
    return replace(changed, public_text=public)


def material_of(
    session: Session, adapters: Sequence[ClientAdapter], screen: Screen = pass_all, round_num: int = 1
) -> Material:
    """Return what a step of the session distils on."""
    writers = writers_of(session.plan, open_engine(session), adapters, round_num)
    return make_material(distillation_of(session.plan), session.public_text, writers, screen)
