"""A stock Flower strategy in place of our own mean: it sees the clients' factors and gives the next ones.

The rest of a round stays ours: validation, checkpoints, the wire. A stock strategy works on named arrays, so
it averages A and B, or takes their median; what that does to the products B A, its user has to know. What it
remembers between rounds is in no checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm.adapters.layout import AdapterState
from fedllm.errors import RunFailedError
from fedllm.plan import capabilities
from fedllm.plan.capabilities import Part, Setting, refuse_conflicts
from fedllm.plan.run_plan import RunPlan
from fedllm.wire.stock import read_plain, write_plain
from strategies.aggregation.sums import HeldUpdate


@dataclass(frozen=True)
class _Nodes:
    """A grid as far as a strategy asks it before a round: how many nodes there are."""

    number: int

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.number + 1))


_STOCK = Part(
    "a stock Flower strategy",
    Setting(
        "it takes a mean of the factors by itself and may leave clients out of it",
        needs=(capabilities.OWN_UPDATES, capabilities.ONE_RANK),
        hides=(capabilities.OUR_MEAN,),
    ),
    "leave the stock strategy out",
)


def check_stock(plan: RunPlan) -> None:
    """Refuse a run whose rule leaves nothing for a stock strategy to do, or not what it expects.

    Raises:
        ConfigError: the run needs our own mean of the updates, or its clients have no common factors.
    """
    refuse_conflicts([_STOCK, *plan.parts()])


def stock_change(
    strategy: Strategy, round_num: int, start: AdapterState, held: Sequence[HeldUpdate]
) -> torch.Tensor:
    """Return the change [P] of the adapter that `strategy` makes of the clients' adapters and weights.

    Raises:
        RunFailedError: it gives no adapter.
    """
    number = max(len(held), getattr(strategy, "min_available_nodes", 0))
    nodes = cast(Grid, _Nodes(number))
    list(strategy.configure_train(round_num, write_plain(start), ConfigRecord(), nodes))
    replies = [_reply(node, start, client) for node, client in enumerate(held, start=1)]
    arrays, _ = strategy.aggregate_train(round_num, replies)
    if arrays is None:
        raise RunFailedError(f"round {round_num}: {type(strategy).__name__} gave no adapter")
    return read_plain(arrays, start.layout).vector - start.vector


def _reply(node_id: int, start: AdapterState, client: HeldUpdate) -> Message:
    """Return what a client of a stock strategy would have answered."""
    metrics: dict[str, Any] = {"num-examples": client.weight}
    adapter = AdapterState(start.layout, start.vector + client.delta)
    content = RecordDict({"arrays": write_plain(adapter), "metrics": MetricRecord(metrics)})
    return Message(content, dst_node_id=node_id, message_type="train")
