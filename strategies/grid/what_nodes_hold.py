"""What a request may leave out: what a node makes from the run's seed, or was sent before."""

from dataclasses import dataclass, field

import torch
from flwr.app import RecordDict

from fedllm.adapters.layout import AdapterState
from fedllm.adapters.parts import other_part, part_of
from fedllm.errors import NotHeldError
from fedllm.plan.aggregation import AggregationRule
from fedllm.wire.refusals import read_error
from fedllm.wire.requests import Sending


@dataclass(eq=False)
class HeldByNodes:
    """What each node is believed to hold. A node that turns out not to is sent everything the next time."""

    base_deltas: dict[int, str] = field(default_factory=dict)  # node -> digest of the base delta sent last
    other_bits: set[int] = field(default_factory=set)  # nodes whose machine makes other bits from the seed

    def what_to_send(self, node_id: int, part: str, base_delta_digest: str) -> Sending:
        """Return what the next request to a node must contain, which then counts as held."""
        is_new = self.base_deltas.get(node_id) != base_delta_digest
        self.base_deltas[node_id] = base_delta_digest
        return Sending("both" if node_id in self.other_bits else part, is_new)

    def forget(self, node_id: int, content: RecordDict | None) -> None:
        """Take back what the last request to a node counted for; `content` is its reply, if there is one."""
        self.base_deltas.pop(node_id, None)
        if content is not None and read_error(content) == NotHeldError.code:
            self.other_bits.add(node_id)


def part_to_send(rule: AggregationRule, adapter: AdapterState, initial: AdapterState) -> str:
    """Return the part of an adapter that clients cannot make themselves from the run's seed.

    A that is frozen from the first round on (FFA-LoRA) and B that never leaves a client (FedSA-LoRA) are
    those of the initial adapter, bit for bit; a run that began with another adapter has them sent.
    """
    part = rule.changing_part
    rest = other_part(part)
    # Compared as integers: -0.0 == 0.0, and a NaN differs from itself
    bits, first = (
        part_of(state.layout, state.vector, rest).view(torch.int32) for state in (adapter, initial)
    )
    return part if torch.equal(bits, first) else "both"
