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
from fedllm.errors import ConfigError, RunFailedError
from fedllm.plan.run_plan import RunPlan
from fedllm.wire.stock import read_plain, write_plain
from strategies.aggregation.sums import HeldUpdate


@dataclass(frozen=True)
class _Nodes:
    """A grid as far as a strategy asks it before a round: how many nodes there are."""

    number: int

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.number + 1))


def check_stock(plan: RunPlan) -> None:
    """Refuse a run whose rule leaves nothing for a stock strategy to do, or not what it expects.

    Raises:
        ConfigError: another read-out, robust rule, optimizer or weighting than a stock strategy's own,
            clients without common factors, noise that the server is to add, or a distillation step.
    """
    rule = plan.aggregation
    if plan.privacy is not None and plan.privacy.is_central:
        raise ConfigError("a stock Flower strategy adds no noise; use privacy.trust = local without it")
    if plan.distillation is not None:
        raise ConfigError(
            "a stock Flower strategy may leave clients out of its mean and does not say whom, so they cannot"
            " teach: set distill.when = never with it"
        )
    has_own = rule.read_out != "factor-mean" or rule.robust != "none" or not rule.optimizer.is_plain
    if has_own or rule.weighting == "product-norm" or rule.mixed_ranks or rule.node_sum:
        raise ConfigError(
            "a stock Flower strategy averages the factors of clients of one rank by itself: use"
            " aggregation.read-out = factor-mean, and no robust rule, server optimizer, product-norm,"
            " lora.client-ranks or wire.node-sum with it"
        )


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
