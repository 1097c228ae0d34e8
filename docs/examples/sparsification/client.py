"""Top-k sparsification with error feedback (arXiv 1809.07599): the largest values of a change travel.

A client keeps what it left out and adds it to its next change, so that nothing is lost, only late.
"""

from dataclasses import replace
from functools import partial

import torch

from clients.technique import NodeRound, Technique, Works
from fedllm.adapters.layout import AdapterLayout
from fedllm.plan.run_plan import RunPlan

LEFT_OUT = "left-out"  # its name among the kept vectors


def sparsification(plan: RunPlan, layout: AdapterLayout) -> Technique | None:
    """Return the technique, None where the whole change travels."""
    share = plan.config.train.sent_share
    if share == 1:
        return None
    return Technique(name="sparsification", kept={LEFT_OUT: layout.size}, after=partial(_send_largest, share))


def _send_largest(share: float, this_round: NodeRound, works: Works) -> Works:
    done = []
    for work in works:
        delta_P = work.sent.delta
        whole_P = delta_P + work.kept.get(LEFT_OUT, torch.zeros(()))
        largest = whole_P.abs().topk(max(1, round(share * len(whole_P)))).indices
        # What has piled up travels in steps of this round's size: the server refuses larger ones.
        bound = float(delta_P.abs().max())
        sent_P = torch.zeros_like(whole_P).index_copy(0, largest, whole_P[largest].clamp(-bound, bound))
        work = replace(work, update=replace(work.sent, delta=sent_P))
        done.append(work.keeping(LEFT_OUT, whole_P - sent_P))
    return done
