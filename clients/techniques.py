"""The techniques of a run at the client, in the order in which their steps are called."""

from collections.abc import Mapping

from clients.control_variates import control_variates
from clients.data_holder import DataHolder
from clients.local_b import local_b
from clients.personal import personal_adapter
from clients.privacy import client_privacy
from clients.technique import NodeRound, Technique
from fedllm.adapters.layout import AdapterLayout
from fedllm.messages import TrainRequest
from fedllm.plan.run_plan import RunPlan


def techniques_of(plan: RunPlan, layout: AdapterLayout) -> tuple[Technique, ...]:
    """Return the techniques that a plan names; a new one is one more line."""
    listed = (
        local_b(plan, layout),
        control_variates(plan, layout),
        client_privacy(plan),  # after all that change a job: its rows replace whatever the job had
        personal_adapter(plan, layout),  # last: it trains with the engine itself
    )
    return tuple(technique for technique in listed if technique is not None)


def plan_node_round(
    holder: DataHolder,
    request: TrainRequest,
    *,
    weighting: str = "",
    labels: Mapping[str, bytes] | None = None,
) -> NodeRound:
    """Return the round of a request; `weighting` replaces the plan's own, as a stock strategy needs."""
    plan, number = holder.plan, request.round_num
    return NodeRound(
        holder,
        request,
        techniques_of(plan, request.adapter.layout),
        training=plan.training(number),
        trained=plan.aggregation.trained_in(number),
        returned=plan.aggregation.returned_in(number),
        weighting=weighting or plan.aggregation.weighting,
        labels=labels or {},
    )
