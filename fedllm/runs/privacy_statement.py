"""What may be said about the privacy of a finished run: `privacy.json`, and the same in words.

After section 5.3 of "How to DP-fy ML" (Ponomareva et al. 2023, arXiv 2303.00654) and TF Privacy's statement:
no epsilon without its unit, its neighbours, its delta and what it does not cover.
"""

import math
from typing import Any

from fedllm.plan.privacy import PrivacyPlan
from fedllm.privacy.accounting import accountant_name
from fedllm.privacy.ledger import Ledger

_UNITS = {"example": "one row of one data holder", "client": "everything one data holder ever sends"}
AUDIT = (
    "an audit (fedllm audit) gives a lower bound: what it finds refutes a claim, what it does not find proves"
    " nothing; the lower bound is not a guarantee, epsilon above is"
)
_WHOLE = "the published adapter, and every adapter the run passed through"
_ADDED = "what the run added to the adapter that it began from"
_BEFORE = (
    "the adapter that the run began from: of rows that trained it too, its own epsilon and this one add up,"
    " and without one of its own there is none"
)
_NOISED_BY = {
    "central": "the server adds the noise and sees every clipped update: it is trusted",
    "local": "every data holder adds the noise to what it sends: the server is not trusted",
    "distributed": "every data holder adds a share of the noise; the server sees their sum alone",
}


def statement_of(
    plan: PrivacyPlan, ledger: Ledger, *, num_clients: int, num_rounds: int, began_from: str = ""
) -> dict[str, Any]:
    """Return the content of `privacy.json`.

    `began_from` is the digest of an adapter of other training that the run began from: what that one knows of
    the same rows has no noise of this run.
    """
    charges = [charge for sums in ledger.accounts.values() for charge in sums]
    counts = [sum(charge.count for charge in sums) for sums in ledger.accounts.values()]
    return {
        "unit": plan.unit,
        "unit_in_words": _UNITS[plan.unit],
        "relation": plan.relation,
        "epsilon": _rounded(ledger.epsilon(plan.delta)),
        "delta": plan.delta,
        "budget": plan.epsilon,
        "accountant": accountant_name(charges),
        "epsilon_renyi_check": ledger.renyi_check(plan.delta),
        "trust": plan.trust,
        "trust_in_words": _NOISED_BY[plan.trust],
        "mechanism": _mechanism(plan),
        "sampling": _sampling(plan),
        "noise_multiplier": _range([charge.noise_multiplier for charge in charges]),
        "sampling_rate": _range([charge.rate for charge in charges]),
        "releases_of_a_unit": max(counts, default=0),
        "clip": plan.clip,
        "clip_is_adaptive": plan.adaptive,
        "denominator": plan.denominator if plan.is_central else None,
        "num_clients": num_clients,
        "num_rounds": num_rounds,
        "noise_source": "ChaCha20 under a secret of the operating system's, which is not published",
        "covers": _ADDED if began_from else _WHOLE,
        "does_not_cover": ([_BEFORE] if began_from else []) + not_covered(plan),
        "began_from": began_from,
        "audit": AUDIT,
        "num_accounts": len(ledger.accounts),
    }


def not_covered(plan: PrivacyPlan) -> list[str]:
    """Return what leaves data holders without noise, or is decided by looking at private data."""
    numbers = "the number of training and of held-out rows, which every data holder declares when it joins"
    if plan.is_by_example:
        numbers += ", and which sets its weight, sampling rate and noise: neighbours have as many rows"
    found = [
        numbers,
        "who took part in which round, and which data holders failed: rounds.jsonl names them",
        "the choice of hyper-parameters, if other runs on the same text led to it; other runs add up",
    ]
    if plan.is_distributed:
        found.append(
            "data holders that collude with the server: each knows its own share of the noise, and c of the t"
            " whose answers a sum needs leave sqrt((t - c) / t) of the planned noise; holders that a server"
            " invents are among them"
        )
        found.append(
            "a server that tells data holders different lists of who answered: a sum opened so has the"
            " noise of fewer than t of them"
        )
    if plan.metrics == "all":
        found.append(
            "training losses, numbers of tokens and seconds; losses under personal adapters and at home"
        )
    if plan.metrics in ("all", "held-out"):
        rows = (
            "rows that are held out of training have no guarantee of their own: their mean loss is published"
        )
        found.append(rows if plan.is_by_example else "mean held-out losses, which are a data holder's own")
    if plan.is_by_example:
        found.append("all rows of a data holder together: the unit is one row, and rows that repeat add up")
        found.append(
            "which rows are held out: a row is one of those trained on, and the split is taken as given"
        )
    return found


def in_words(plan: PrivacyPlan, statement: dict[str, Any]) -> str:
    """Return the paragraph and the list of a model card."""
    noise = statement["noise_multiplier"]
    deviations = f"{noise[0]:.3g}" if noise[0] == noise[1] else f"{noise[0]:.3g} to {noise[1]:.3g}"
    what = "What this run added to the adapter it began from" if statement["began_from"] else "This adapter"
    lines = [
        f"{what} is ({statement['epsilon']:g}, {plan.delta:g})-differentially private for"
        f" {statement['unit_in_words']}; neighbours: {plan.relation}.",
        f"Mechanism: {statement['mechanism']}, clip {plan.clip:g}{' at first, adaptive' * plan.adaptive},"
        f" noise multiplier {deviations}, {statement['releases_of_a_unit']} releases of a unit at most;"
        f" {statement['sampling']}.",
        f"Trust: {statement['trust_in_words']}. Accountant: {statement['accountant']}.",
        "",
        f"Audits: {AUDIT}.",
        "",
        "Not covered:",
        "",
        *(f"- {item}" for item in statement["does_not_cover"]),
    ]
    return "\n".join(lines) + "\n"


def summary_line(plan: PrivacyPlan) -> str:
    """Return what a plan promises, in one line."""
    promise = (
        f"epsilon {plan.epsilon:g} at delta {plan.delta:g} for {_UNITS[plan.unit]}; {_NOISED_BY[plan.trust]}"
    )
    if not plan.is_distributed:
        return promise
    number = round(plan.denominator)
    more = f"{plan.noise_of_all(number):.2f} times the planned"
    return f"{promise}; where all {number} of a round answer, the noise is {more}"


def _mechanism(plan: PrivacyPlan) -> str:
    if plan.is_by_example:
        return "DP-SGD"
    return f"clipped updates with {'discrete ' * plan.is_distributed}Gaussian noise"


def _sampling(plan: PrivacyPlan) -> str:
    if plan.is_by_example:
        return "every step draws each row by its own secret coin, and this is what is counted"
    if plan.rate < 1:
        return "every round draws each data holder by its own secret coin, and this is what is counted"
    return "no amplification by sampling is claimed"


def _range(values: list[float]) -> list[float]:
    return [min(values), max(values)] if values else [0.0, 0.0]


def _rounded(epsilon: float) -> float:
    """Return epsilon rounded up to four digits after the point."""
    return math.ceil(epsilon * 1e4) / 1e4
