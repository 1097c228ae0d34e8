"""The techniques of a run at the client, in the order in which their steps are called."""

from clients.control_variates import control_variates
from clients.local_b import local_b
from clients.personal import personal_adapter
from clients.privacy import central_clip, private_rows
from clients.technique import Technique
from fedllm.adapters.layout import AdapterLayout
from fedllm.plan.run_plan import RunPlan


def techniques_of(plan: RunPlan, layout: AdapterLayout) -> tuple[Technique, ...]:
    """Return the techniques that a plan names; a new one is one more line.

    The order matters: private rows replace whatever a job was to train on, and personal adapters, which train
    with the engine themselves, see what all others have done.
    """
    listed = (
        local_b(plan, layout),
        control_variates(plan, layout),
        private_rows(plan),
        central_clip(plan),
        personal_adapter(plan, layout),
    )
    return tuple(technique for technique in listed if technique is not None)
