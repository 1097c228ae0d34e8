"""The result of a run as a folder anyone can load, with a card that says how it was made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.adapters.folder import replace_card, save_adapter
from fedllm.adapters.peft_reading import check_peft_reads, names_for_peft
from fedllm.files import write_file
from fedllm.messages import JoinedClient
from fedllm.models.base import open_skeleton
from fedllm.models.files import ModelFiles, copy_tokenizer, resolve_model
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import write_result
from fedllm.runs.spread import measured_ends, spread_and_losses
from fedllm.runs.unlearning import read_unlearning
from strategies.card import model_card, statement_on_privacy, with_answers
from strategies.divergence import warnings_of
from strategies.lineage import keep_lineage

MOST_LETTERS = 4000  # of a text in result.json, so that it stays readable whatever the run generates


def publish_run(
    folder: Path,
    plan: RunPlan,
    state: ServerState,
    stopped: str,
    joined: Mapping[str, JoinedClient],
    bundle: str = "",
) -> list[str]:
    """Write what a finished run leaves: adapter, lineage, a privacy plan's statement, and `result.json`.

    Returns the warnings in it. `stopped` says why the run ended before its last round, "" where it did not;
    `joined` are the clients that took part, `bundle` the digest of the code that was shipped to them.
    """
    files = resolve_model(plan.config.model.name)
    result = summary(state, publish_adapter(folder, plan, files, state, joined))
    keep_lineage(folder, plan, files, state, joined, bundle)
    if stopped:
        result["stopped"] = stopped
    statement = statement_on_privacy(plan, state)
    if statement is not None:
        # privacy.json has the whole statement, result.json the guarantee alone.
        write_file(folder / "privacy.json", json.dumps(statement, indent=1, allow_nan=False) + "\n")
        keys = ("unit", "epsilon", "delta", "budget", "trust")
        result["privacy"] = {key: statement[key] for key in keys}
    if plan.secure is not None:
        pinned = sum(client.is_pinned for client in joined.values())
        result["secure"] = {**asdict(plan.secure), "clients": len(joined), "pinned": pinned}
    write_result(folder, result)
    return list(result["warnings"])


def summary(state: ServerState, adapter: Path) -> dict[str, Any]:
    """Return the content of `result.json`: held-out losses before and after, and the adapter.

    The losses are those of the clients that were measured both times; else there are none.
    Under "personal" are the losses with every client's personal adapter on top, where there are any.
    """
    held_out = {}
    for name, record in measured_ends(state).items():
        held_out[name] = spread_and_losses(record.held_out)
        if record.personal_held_out:
            held_out[name]["personal"] = spread_and_losses(record.personal_held_out)
    at_home = state.records[-1].at_home if state.records else None
    return {
        "status": "completed",
        "rounds": state.round_num,
        "adapter": str(adapter),
        "digest": state.adapter.digest,
        "held_out": held_out,
        **({"at_home": at_home.to_result()} if at_home is not None and at_home.home else {}),
        "warnings": warnings_of(measured_ends(state), state.records[-1] if state.records else None),
    }


def publish_adapter(
    folder: Path,
    plan: RunPlan,
    files: ModelFiles,
    state: ServerState,
    joined: Mapping[str, JoinedClient] = MappingProxyType({}),
) -> Path:
    """Write `folder`/adapter from the final state and return its path; a failure leaves the earlier one.

    What a run has added to the base model is part of the published adapter, as further ranks: one ordinary
    PEFT adapter for the base model everybody has.

    Raises:
        IntegrityError: PEFT reads another adapter from the folder than was trained.
    """
    target = folder / "adapter"  # what `fedllm evaluate` and PEFT are given
    adapter, skeleton = adapter_with_base_delta(state.adapter, state.base_delta), open_skeleton(files)
    modules = [matrix.module for matrix in adapter.layout.matrices]

    def finish(building: Path) -> None:
        copy_tokenizer(files.folder, building)
        check_peft_reads(building, skeleton, adapter)

    save_adapter(
        target,
        adapter,
        base_model=files.public_name,
        revision=files.revision,
        target_modules=names_for_peft(skeleton, modules) or modules,
        card=model_card(plan, files, state, joined, read_unlearning(folder)),
        finish=finish,
    )
    return target


def keep_answers(folder: Path, answers: Mapping[str, Sequence[str]]) -> None:
    """Keep "prompts" with the answers "before" and "after" in the result of a run and on its card.

    They are those of base model and published adapter, so they say no more of private text than it does.
    """
    kept = {name: [text[:MOST_LETTERS] for text in texts] for name, texts in answers.items()}
    write_result(folder, {**json.loads((folder / "result.json").read_text()), "answers": kept})
    adapter = folder / "adapter"
    if kept["prompts"]:
        replace_card(adapter, with_answers((adapter / "README.md").read_text(), kept))
