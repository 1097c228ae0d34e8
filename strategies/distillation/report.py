"""What a distillation step did, in a line: on the screen, in Flower's log, in the model card."""

from fedllm.runs.records import DistilRecord


def sentence(record: DistilRecord) -> str:
    """Return the line of a step."""
    if record.before is None:
        return f"not distilled: {record.reason}; the aggregate stays"
    parts = [
        f"{'distilled' if record.kept else 'not distilled'}: {record.reason}"
        f" ({_number(record.before)} to {_number(record.after)})",
        f"base model {_number(record.base)}, ensemble {_number(record.ensemble)}{_gap(record)}",
    ]
    if record.control is not None:
        parts.append(f"fine-tuning on the same texts {_number(record.control)}")
    if len(record.domains_after) > 1:
        worst = max(record.domains_after, key=lambda domain: (record.domains_after[domain], domain))
        before, after = record.domains_before[worst], record.domains_after[worst]
        parts.append(f"worst domain {worst} {before:.3f} to {after:.3f}")
    taught = f"{record.teacher} of {record.num_teachers} clients on {record.num_texts} {_texts(record)}"
    parts += [taught, f"{record.seconds:.1f} s"]
    return "; ".join(parts)


def in_short(record: DistilRecord | None) -> str:
    """Return the step's cell of the table of rounds: what it changed, or that it was refused."""
    if record is None:
        return ""
    if not record.kept or record.before is None or record.after is None:
        return "refused"
    return f"{record.after - record.before:+.3f}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _gap(record: DistilRecord) -> str:
    return "" if record.gap_closed is None else f", {record.gap_closed:.0%} of the gap to it closed"


def _texts(record: DistilRecord) -> str:
    kind = {"both": "synthetic and public"}.get(record.text, record.text)
    held_out = "" if record.held_out_text == "public" else ", held-out texts synthetic too"
    removed = f", {record.num_removed} copies left out" if record.num_removed else ""
    refused = f", {record.num_refused} of {record.num_written} written refused as not original"
    return f"{kind} texts{held_out}{removed}{refused if record.num_refused else ''}"
