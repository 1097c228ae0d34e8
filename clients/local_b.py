"""A local B (FedSA-LoRA, arXiv 2410.01463): clients share A, and every client keeps a B of its own."""

from functools import partial

import torch

from clients.technique import ClientWork, NodeRound, Technique, Vectors, Works
from fedllm.adapters.layout import AdapterLayout, at_rank, with_rank
from fedllm.adapters.parts import part_of, part_size, whole_of
from fedllm.plan.run_plan import RunPlan

LOCAL_B = "local-b"  # its name among the kept vectors


def local_b(plan: RunPlan, layout: AdapterLayout) -> Technique | None:
    """Return the technique, None where B is the server's."""
    if not plan.aggregation.local_b:
        return None
    return Technique(
        name="local B",
        kept={LOCAL_B: part_size(layout, "b")},
        is_evaluated=True,
        start=partial(_with_own_b, layout),
        after=_keep_b,
    )


def _with_own_b(layout: AdapterLayout, start_P: torch.Tensor, kept: Vectors) -> torch.Tensor:
    """Return the server's adapter with the client's B; before its first round that is the initial one."""
    return whole_of(layout, kept[LOCAL_B], "b", rest_P=start_P) if LOCAL_B in kept else start_P


def _keep_b(this_round: NodeRound, works: Works) -> Works:
    return [work.keeping(LOCAL_B, _b_after(this_round.layout, work)) for work in works]


def _b_after(layout: AdapterLayout, work: ClientWork) -> torch.Tensor:
    own_layout = at_rank(layout, work.sent.rank)  # a client of a smaller rank keeps zeros in the rest
    return part_of(layout, with_rank(work.job.start + work.sent.delta, own_layout, layout.rank), "b")
