"""The training jobs of a round as a server would ask for them, without a server."""

from dataclasses import replace

from clients.data_holder import DataHolder
from clients.jobs import make_job
from clients.techniques import plan_node_round
from fedllm.adapters.base_delta import no_base_delta
from fedllm.adapters.layout import initial_adapter
from fedllm.engine.jobs import Job
from fedllm.messages import TrainRequest


def round_jobs(holder: DataHolder, *, round_num: int, steps: int) -> list[Job]:
    """Return one job per client that has rows, in the server's order, all from the initial adapter.

    The rows follow those of earlier rounds of as many steps; the client took part in each.
    """
    plan, layout = holder.plan, holder.engine.layout
    clients = sorted(name for name, client in holder.clients.items() if client.train)
    drawn = (round_num - 1) * steps * plan.config.train.batch_size
    adapter = initial_adapter(layout, plan.config.seed, plan.init_a)
    request = TrainRequest(
        round_num=round_num,
        drawn=dict.fromkeys(clients, drawn),
        ranks=dict.fromkeys(clients, layout.rank),
        adapter=adapter,
        base_delta=no_base_delta(layout),
        plan_digest=plan.digest,
    )
    this_round = plan_node_round(holder, request)
    this_round = replace(this_round, training=replace(this_round.training, steps=steps))
    return [
        make_job(this_round, holder.clients[name], drawn, rank=layout.rank, start_P=adapter.vector)
        for name in clients
    ]
