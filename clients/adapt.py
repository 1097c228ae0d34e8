"""What a node does after the last round: its clients train on at home, and keep what comes of it."""

from collections.abc import Mapping

from clients.at_home import Starts, can_choose, train_both
from clients.coarse import coarse_at_home
from clients.data_holder import DataHolder
from clients.home_folder import home_folder, modules_of, save_home
from clients.technique import failure_of
from clients.tokens import ClientTokens
from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.adapters.layout import AdapterState
from fedllm.errors import CheckpointError, ConfigError, WithheldError
from fedllm.files import remove_unfinished
from fedllm.messages import ClientAtHome, ClientFailure, EvaluateRequest
from fedllm.models.with_base_delta import with_base_delta
from fedllm.plan.training import HomeTraining
from fedllm.site_policy import load_policy

TOGETHER = 32  # clients whose adapters are in memory at once


def adapt_clients(holder: DataHolder, request: EvaluateRequest) -> list[ClientAtHome | ClientFailure]:
    """Let the clients that the request names train on, keep what they chose, and return what it gave them.

    Where the plan keeps losses with the clients, all are answered for alike: who has too few rows to choose
    by, or could not keep its adapter, is told on this machine alone.

    Raises:
        ConfigError: the run has no training at home, or its rank is more than this machine has room for.
    """
    numbers = holder.plan.at_home
    if numbers is None:
        raise ConfigError("personal.mode is not 'finetune', so nobody trains on at home in this run")
    if 0 < holder.max_rank < request.adapter.layout.rank:
        raise ConfigError(
            f"an adapter of rank {request.adapter.layout.rank} cannot be trained on at home: this node's"
            f" max-rank is {holder.max_rank}"
        )
    hosted = {name: holder.clients[name] for name in request.drawn if name in holder.clients}
    able = {name: client for name, client in hosted.items() if can_choose(client)}
    answers: dict[str, ClientAtHome | ClientFailure] = {}
    for start in range(0, len(able), TOGETHER):
        answers |= _adapt(holder, request, numbers, dict(list(able.items())[start : start + TOGETHER]))
    if not numbers.is_reported:
        return [ClientFailure(client_id=name, code=WithheldError.code) for name in request.drawn]
    return [answers.get(name, ClientFailure(client_id=name, code="no-data")) for name in request.drawn]


def _adapt(
    holder: DataHolder, request: EvaluateRequest, numbers: HomeTraining, clients: Mapping[str, ClientTokens]
) -> dict[str, ClientAtHome | ClientFailure]:
    engine, layout = holder.engine, request.adapter.layout
    found = train_both(
        engine,
        layout,
        clients,
        Starts(holder.initial.vector, request.adapter.vector),
        numbers,
        drawn=request.drawn,
        seed=holder.plan.config.seed,
        on_shared=with_base_delta(engine.base, holder.base_deltas.keep(request.base_delta)),
    )
    modules = modules_of(engine.base.model, layout)
    answers: dict[str, ClientAtHome | ClientFailure] = {}
    for answer, vector_P in found:
        name = answer.client_id
        # What the run has added to the base model is part of it: it is loaded on the base everybody has.
        state = adapter_with_base_delta(AdapterState(layout, vector_P), request.base_delta)
        folder = home_folder(holder.store, name)
        remove_unfinished(folder.parent)
        try:
            save_home(folder, state, answer, holder.files, modules)
            answers[name] = answer if load_policy().is_exact else coarse_at_home(answer)
        except CheckpointError as error:
            answers[name] = failure_of(name, error)
    return answers
