"""The training jobs of a round as a server would ask for them, without a server."""

from dataclasses import replace

from clients.holder import Holder
from clients.work import make_job
from fedllm.adapters.drift import no_drift
from fedllm.adapters.layout import initial_adapter
from fedllm.rule import aggregation_rule, init_a_of
from fedllm.training.jobs import Job
from fedllm.training.numbers import local_training
from fedllm.types import TrainRequest


def round_jobs(holder: Holder, *, round_num: int, steps: int) -> list[Job]:
    """Return one job per client that has rows, in the server's order, all from the initial adapter.

    The rows are those that follow the ones of earlier rounds of as many steps, in each of which the client
    took part.
    """
    config = holder.config
    training = replace(local_training(config, round_num), steps=steps)
    clients = sorted(name for name, client in holder.clients.items() if client.train)
    drawn = (round_num - 1) * steps * training.batch_size
    rule, layout = aggregation_rule(config), holder.engine.layout
    request = TrainRequest(
        round_num=round_num,
        client_ids=tuple(clients),
        num_drawn=(drawn,) * len(clients),
        ranks=(layout.rank,) * len(clients),
        adapter=initial_adapter(layout, config.seed, init_a_of(config)),
        drift=no_drift(layout),
        trained=rule.trained_in(round_num),
        local_b=False,
        node_sum=False,
        training=training,
        codec=config.wire.codec,
        weighting=rule.weighting,
        seed=config.seed,
    )
    return [make_job(holder.clients[name], request, drawn, layout.rank) for name in clients]
