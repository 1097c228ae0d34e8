"""From a request to jobs: what each client kept, where it starts, and the rows that it trains on."""

from collections.abc import Mapping, Sequence

import torch

from clients.state import PrivateStore, load_private
from clients.technique import ClientWork, NodeRound, Technique, Vectors, Works, start_of
from clients.tokens import ClientTokens
from fedllm.adapters.layout import at_rank, with_rank
from fedllm.data.shards import draw_rows
from fedllm.engine.jobs import Job
from fedllm.seeds import derive_seed


def begin_clients(this_round: NodeRound, drawn: Mapping[str, int]) -> Works:
    """Return the work of each client in `drawn`, which counts the rows it has drawn so far."""
    holder, request, works = this_round.holder, this_round.request, []
    for name, kept in load_kept(holder.store, this_round.techniques, drawn).items():
        client = holder.clients[name]
        start_P = start_of(this_round.techniques, request.adapter.vector, kept)
        job = make_job(this_round, client, drawn[name], rank=request.ranks[name], start_P=start_P)
        works.append(ClientWork(client, drawn[name], start_P, kept, job))
    return works


def load_kept(
    store: PrivateStore, techniques: Sequence[Technique], drawn: Mapping[str, int]
) -> dict[str, Vectors]:
    """Return by name what each client kept for these techniques when it had drawn so many rows.

    Every client has an entry, which is empty before its first round and where its state is lost.
    """
    sizes = {name: size for technique in techniques for name, size in technique.kept.items()}
    # Without sizes no file is looked for: most runs keep nothing.
    return {
        client_id: load_private(store, client_id, num_drawn, sizes) if sizes else {}
        for client_id, num_drawn in drawn.items()
    }


def make_job(
    this_round: NodeRound, client: ClientTokens, num_drawn: int, *, rank: int, start_P: torch.Tensor
) -> Job:
    """Return a client's job in a round: the rows after those it has drawn, cut into local steps.

    It trains the first `rank` ranks of `start_P`, an adapter of the run's layout.
    """
    training, layout = this_round.training, this_round.layout
    size = training.batch_size
    # Rows may all be of no use without anybody being told (`num_public`): then a step has none.
    drawn = (
        ()
        if not client.train
        else draw_rows(
            len(client.train),
            seed=this_round.seed,
            client_id=client.client_id,
            start=num_drawn,  # on from there: no row comes twice before all have come once
            count=training.steps * size,
        )
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
