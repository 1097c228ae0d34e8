"""What a distillation step did, in a line: on the screen, in Flower's log, in the model card."""

import math

from fedllm.runs.records import DistillationLosses, DistillationRecord, DistillationTexts


def describe_step(record: DistillationRecord) -> str:
    """Return the line that is shown after a step."""
    losses = record.losses
    if losses is None:
        return f"not distilled: {record.reason}; the aggregate stays"
    held_out = losses.held_out
    # Where nothing was taught the aggregate's loss is that of before and after.
    is_taught = held_out.after != held_out.before
    moved = f" ({held_out.before:.3f} to {held_out.after:.3f})" if is_taught else ""
    parts = [
        f"{'distilled' if record.kept else 'not distilled'}: {record.reason}{moved}",
        f"base model {losses.base:.3f}, ensemble {losses.ensemble:.3f}"
        f"{describe_gap(losses) if is_taught else ''}",
    ]
    if losses.control is not None:
        parts.append(f"fine-tuning on the same texts {losses.control:.3f}")
    if len(losses.domains) > 1 and math.isfinite(held_out.after):
        # The name decides between equal losses, so that the line is the same in every run.
        worst = max(losses.domains, key=lambda domain: (losses.domains[domain].after, domain))
        change = losses.domains[worst]
        parts.append(f"worst domain {worst} {change.before:.3f} to {change.after:.3f}")
    teachers, texts = record.teachers, record.texts
    parts.append(f"{teachers.kind} of {teachers.number} clients on {texts.number} {_kinds(texts)}")
    return "; ".join([*parts, f"{record.seconds:.1f} s"])


def table_cell(record: DistillationRecord | None) -> str:
    """Return the step's cell in the table of rounds: by how much the loss changed, or "refused"."""
    if record is None:
        return ""
    if not record.kept or record.losses is None:
        return "refused"
    return f"{record.losses.held_out.after - record.losses.held_out.before:+.3f}"


def describe_gap(losses: DistillationLosses) -> str:
    """Return how much of the gap to the ensemble was closed, as a further clause; "" where unknown."""
    return "" if losses.gap_closed is None else f", {losses.gap_closed:.0%} of the gap to it closed"


def name_kind(texts: DistillationTexts) -> str:
    """Return the kind of the texts in words."""
    return "synthetic and public" if texts.kind == "both" else texts.kind


def _kinds(texts: DistillationTexts) -> str:
    held_out = "" if texts.held_out_kind == "public" else ", held-out texts synthetic too"
    removed = f", {texts.num_removed} copies left out" if texts.num_removed else ""
    refused = f", {texts.num_refused} of {texts.num_written} written refused as not original"
    return f"{name_kind(texts)} texts{held_out}{removed}{refused if texts.num_refused else ''}"
