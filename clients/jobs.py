"""A round at one node, and the training job of each client that the round gives."""

from dataclasses import dataclass

import torch

from clients.data_holder import ClientTokens, DataHolder
from fedllm.adapters.layout import AdapterLayout, at_rank, with_rank
from fedllm.data.shards import draw_rows
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining, TrainRequest
from fedllm.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class NodeRound:
    """A train request at the node that received it, and what the node's own plan says of that round.

    `trained` is the part of the adapter that clients train, `returned` the part of their delta that leaves.
    """

    holder: DataHolder
    request: TrainRequest
    training: LocalTraining
    trained: str
    returned: str
    weighting: str

    @property
    def layout(self) -> AdapterLayout:
        """The layout of the run's adapter."""
        return self.request.adapter.layout

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.holder.plan.config.seed


def plan_node_round(holder: DataHolder, request: TrainRequest, *, weighting: str = "") -> NodeRound:
    """Return the round of a request; `weighting` replaces the plan's own, as a stock strategy needs."""
    plan, number = holder.plan, request.round_num
    return NodeRound(
        holder,
        request,
        training=plan.training(number),
        trained=plan.aggregation.trained_in(number),
        returned=plan.aggregation.returned_in(number),
        weighting=weighting or plan.aggregation.weighting,
    )


def make_job(
    this_round: NodeRound, client: ClientTokens, num_drawn: int, *, rank: int, start_P: torch.Tensor
) -> Job:
    """Return a client's job in a round: the rows after those it has drawn, cut into local steps.

    It trains the first `rank` ranks of `start_P`, an adapter of the run's layout.
    """
    training, layout = this_round.training, this_round.layout
    size = training.batch_size
    drawn = draw_rows(
        len(client.train),
        seed=this_round.seed,
        client_id=client.client_id,
        start=num_drawn,  # on from there: no row comes twice before all have come once
        count=training.steps * size,
    )
    rows = tuple(client.train[index] for index in drawn)
    return Job(
        client.client_id,
        with_rank(start_P, layout, rank),  # the same object where the rank is the run's
        tuple(rows[step * size : (step + 1) * size] for step in range(training.steps)),
        training,
        trained=this_round.trained,
        layout=at_rank(layout, rank),
        seed=derive_seed(this_round.seed, "client", client.client_id, this_round.request.round_num),
    )
