"""The training jobs of a round as a server would ask for them, without a server."""

from dataclasses import replace

from clients.data_holder import DataHolder
from clients.train import make_job
from fedllm.adapters.base_delta import no_base_delta
from fedllm.adapters.layout import initial_adapter
from fedllm.engine.jobs import Job
from fedllm.messages import TrainRequest
from fedllm.plan.run_plan import resolve
from fedllm.plan.training import local_training


def round_jobs(holder: DataHolder, *, round_num: int, steps: int) -> list[Job]:
    """Return one job per client that has rows, in the server's order, all from the initial adapter.

    The rows are those that follow the ones of earlier rounds of as many steps, in each of which the client
    took part.
    """
    config = holder.plan.config
    training = replace(local_training(config, round_num), steps=steps)
    clients = sorted(name for name, client in holder.clients.items() if client.train)
    drawn = (round_num - 1) * steps * training.batch_size
    rule, layout = resolve(config).aggregation, holder.engine.layout
    request = TrainRequest(
        round_num=round_num,
        client_ids=tuple(clients),
        num_drawn=(drawn,) * len(clients),
        ranks=(layout.rank,) * len(clients),
        adapter=initial_adapter(layout, config.seed, resolve(config).init_a),
        base_delta=no_base_delta(layout),
        trained=rule.trained_in(round_num),
        local_b=False,
        node_sum=False,
        training=training,
        codec=config.wire.codec,
        weighting=rule.weighting,
        seed=config.seed,
    )
    return [make_job(holder.clients[name], request, drawn, layout.rank) for name in clients]
