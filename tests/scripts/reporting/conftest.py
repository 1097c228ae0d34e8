"""Folders of runs as `fedllm run` leaves them, made of records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.run_config import RunConfig
from fedllm.runs.folder import describe_run, write_result, write_rounds
from fedllm.runs.records import (
    AggregationRecord,
    DistillationLosses,
    DistillationRecord,
    DistillationTeachers,
    HomeRecord,
    LossChange,
    PrivacyRecord,
    RoundRecord,
)

HOSTILE = "<script>alert(1)</script>"
CLIENTS = ("news", "의료 기관 하나", HOSTILE, "a name that is longer than any chart has room for")


def losses(round_num: int) -> dict[str, float]:
    """Return close losses of all clients but one, so that names at the ends of lines must make way."""
    return {
        name: 4.0 - 0.3 * round_num + (2.0 if name == "news" else 0.01 * place)
        for place, name in enumerate(CLIENTS)
    }


def records(*, with_home: bool = True) -> list[RoundRecord]:
    """Return a base model's record and three rounds, one of which loses a client and one of which distils."""
    step = DistillationRecord(
        kept=True,
        reason="better",
        teachers=DistillationTeachers(kind="posterior", number=2, weights={"law": {CLIENTS[0]: 0.75}}),
        losses=DistillationLosses(base=5.0, ensemble=3.0, held_out=LossChange(4.0, 3.5)),
    )
    shared = losses(3)
    home = HomeRecord(
        alone={name: loss - 0.1 for name, loss in shared.items()},
        shared=shared,
        home={name: loss - (0.05 if name == "news" else 0.4) for name, loss in shared.items()},
        steps=dict.fromkeys(shared, 4),
    )
    rounds = [RoundRecord(round_num=0, held_out=losses(0))]
    for number in (1, 2, 3):
        rounds.append(
            RoundRecord(
                round_num=number,
                asked=CLIENTS,
                accepted=CLIENTS[1:],
                lost={CLIENTS[0]: "no answer"},
                bytes_up=2_000_000,
                bytes_down=1_000_000,
                seconds=30.0,
                aggregation=AggregationRecord(delta_norm=1.0, rho=0.05 * number, kept_energy=0.99),
                privacy=PrivacyRecord(epsilon=2.0 * number, noise_multiplier=1.0, clip=1.0),
                distillation=step if number == 2 else None,
                held_out=losses(number),
                at_home=home if with_home and number == 3 else None,
            )
        )
    return rounds


@pytest.fixture
def make_run(tmp_path: Path, make_model_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function (name, records, result) -> the folder of a run."""

    def make(name: str = "clinics", rounds: list[RoundRecord] | None = None, **result: Any) -> Path:
        folder = tmp_path / name
        keys = {"run.name": name, "run.output": str(tmp_path), "model.name": str(make_model_folder())}
        describe_run(folder, RunConfig.from_flat({**keys, "lora.rank": 4}))
        write_rounds(folder, records() if rounds is None else rounds)
        answers = {
            "prompts": [f"{HOSTILE} why?"],
            "before": ["No\nidea."],
            "after": ["Because \ud800 of it."],
        }
        write_result(folder, {"status": "completed", "digest": "d", "answers": answers, **result})
        return folder

    return make


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return the folder of a study of three methods."""
    methods = {"base": 5.0, "alone": 4.0, "federated": 3.5}
    summary = {
        name: {
            "mean": loss,
            "deviation": 0.1,
            "worst": {"client": HOSTILE, "loss": loss + 1},
            "clients": {HOSTILE: loss + 1, "news": loss - 1},
            "gained_over_alone": 1.0 if name == "federated" else None,
            "at_equal_tokens": {"mean": loss, "gained_over_alone": 1.0 if name == "federated" else None},
            "others": {"mean": loss, "no_worse_than_alone": 1.0},
            "gap_closed": {"value": 0.7, "low": 0.5, "high": 0.9} if name == "federated" else None,
            "bytes": 10**6,
            "seconds": 3.0,
            "epsilon": None,
            "tokens": 1000,
            "rate": 0.01,
            "steps": 8.0,
        }
        for name, loss in methods.items()
    }
    folder = tmp_path / "study"
    folder.mkdir()
    found = {"name": "domains", "seeds": [0], "rates": [0.003, 0.01, 0.03], "cells": [], "summary": summary}
    (folder / "study.json").write_text(json.dumps({**found, "tried": [], "failed": []}))
    return folder
