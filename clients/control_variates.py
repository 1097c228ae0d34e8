"""A client's half of SCAFFOLD (`fedllm.engine.gradient_terms`): its own c_i, and how it changes.

c_i stays with the client. Its change travels as a second packet, in the codec of the round; the client adds
to its own what the server will read from that packet, so that c stays the mean of all c_i whatever the codec.
"""

from dataclasses import replace

import torch

from clients.technique import ClientWork, NodeRound, Technique, Works
from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.jobs import Result
from fedllm.errors import ConfigError
from fedllm.plan.run_plan import RunPlan
from fedllm.wire.packets import as_received

CONTROL = "control"  # its name among the kept vectors


def control_variates(plan: RunPlan, layout: AdapterLayout) -> Technique | None:
    """Return the technique, None where the run has no control variates."""
    if not plan.config.train.control_variates:
        return None
    return Technique(
        name="control variates", kept={CONTROL: layout.size}, prepare=_correct, after=_send_change
    )


def change_of(result: Result, own_P: torch.Tensor) -> torch.Tensor:
    """Return the change of c_i: from what it was to the mean of the round's gradients."""
    assert result.gradient is not None, "a job with a correction gives its mean gradient"
    return result.gradient.float() - own_P


def changed(own_P: torch.Tensor, change_P: torch.Tensor, payload: str) -> torch.Tensor:
    """Return the new c_i: the change counts as the server reads it."""
    return own_P + as_received(change_P, payload)


def _correct(this_round: NodeRound, works: Works) -> Works:
    """Return jobs whose gradients are corrected by c - c_i."""
    control = this_round.request.control  # the one thing here that no plan can tell
    if control is None:
        raise ConfigError("train.control-variates needs a fedllm server, which sends c with every request")
    return [
        replace(work, job=replace(work.job, correction=control.vector - _own_control(work, control.vector)))
        for work in works
    ]


def _send_change(this_round: NodeRound, works: Works) -> Works:
    """Put the change of c_i in each update, and keep the new c_i."""
    # The plan lets control variates go only with clients of the run's rank, so every vector is [P].
    codec, done = this_round.holder.plan.config.wire.codec, []
    for work in works:
        own_P = _own_control(work, work.trained.delta)
        change_P = change_of(work.trained, own_P)
        kept_P = changed(own_P, change_P, codec)
        done.append(work.sending(control_delta=change_P).keeping(CONTROL, kept_P))
    return done


def _own_control(work: ClientWork, like_P: torch.Tensor) -> torch.Tensor:
    """Return a client's c_i; before its first round it is zero."""
    return work.kept[CONTROL] if CONTROL in work.kept else torch.zeros(like_P.shape)
