"""What a node does after the last round: its clients train on at home, and keep what comes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clients.at_home import can_choose, step_counts, train_at_home
from clients.coarse import coarse_at_home
from clients.data_holder import DataHolder
from clients.technique import failure_of
from clients.tokens import ClientTokens
from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.adapters.folder import save_adapter
from fedllm.adapters.layout import AdapterState
from fedllm.adapters.peft_reading import names_for_peft
from fedllm.errors import CheckpointError, ConfigError, WithheldError
from fedllm.files import make_private_folder, remove_unfinished
from fedllm.messages import ClientAtHome, ClientFailure, EvaluateRequest
from fedllm.models.with_base_delta import with_base_delta
from fedllm.plan.training import HomeTraining
from fedllm.site_policy import load_policy

HOME = "home"  # the folder of a client's own adapter, among what it keeps
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
    engine, layout, seed = holder.engine, request.adapter.layout, holder.plan.config.seed
    steps_alone = {name: numbers.steps_alone(request.drawn[name]) for name in clients}
    alone = train_at_home(
        engine,
        layout,
        clients,
        dict.fromkeys(clients, holder.initial.vector),
        numbers.training,
        counts={name: step_counts(steps) for name, steps in steps_alone.items()},
        seed=seed,
    )
    with with_base_delta(engine.base, holder.base_deltas.keep(request.base_delta)):
        home = train_at_home(
            engine,
            layout,
            clients,
            dict.fromkeys(clients, request.adapter.vector),
            numbers.training,
            counts=dict.fromkeys(clients, step_counts(numbers.training.steps)),
            seed=seed,
            drawn=request.drawn,
        )
    matrices = [matrix.module for matrix in layout.matrices]
    modules = names_for_peft(engine.base.model, matrices) or matrices
    answers: dict[str, ClientAtHome | ClientFailure] = {}
    for name, own in home.items():
        answer = ClientAtHome(
            client_id=name,
            alone=alone[name].loss,
            shared=own.measured[0],
            home=own.loss,
            steps=own.steps,
        )
        try:
            _keep(holder, request, answer, own.vector, modules)
            answers[name] = answer if load_policy().is_exact else coarse_at_home(answer)
        except CheckpointError as error:
            answers[name] = failure_of(name, error)
    return answers


def home_folder(holder: DataHolder, client_id: str) -> Path:
    """Return where a client keeps the adapter that it trained on at home, a PEFT folder."""
    return holder.store.folder / client_id / HOME


def _keep(
    holder: DataHolder,
    request: EvaluateRequest,
    answer: ClientAtHome,
    vector_P: torch.Tensor,
    modules: Sequence[str],
) -> None:
    """Write a client's adapter as a PEFT folder that only this user can open.

    Raises:
        CheckpointError: it could not be written; an earlier one stays.
    """
    folder, files = home_folder(holder, answer.client_id), holder.files
    # What the run has added to the base model is part of it: it is loaded on the base everybody has.
    state = adapter_with_base_delta(AdapterState(request.adapter.layout, vector_P), request.base_delta)
    try:
        make_private_folder(folder.parent)
        remove_unfinished(folder.parent)
        save_adapter(
            folder,
            state,
            base_model=files.public_name,
            revision=files.revision,
            target_modules=modules,
            card=home_card(answer),
            is_public=False,
        )
    except OSError as error:
        raise CheckpointError(
            f"client {answer.client_id}: its adapter cannot be written in {folder} ({error.strerror}); free"
            " space or set state-path"
        ) from None


def home_card(answer: ClientAtHome) -> str:
    """Return the README.md of an adapter that a client trained on at home."""
    return f"""# {answer.client_id}: a private adapter

The adapter of a federation, trained on for {answer.steps} steps with the rows of {answer.client_id} alone.
It was trained on private text without any noise: **do not publish it**.

| held-out loss (nats per token, on rows that chose nothing) | |
|---|---|
| trained alone, without the federation | {answer.alone:.4f} |
| the federation's adapter as it is | {answer.shared:.4f} |
| this adapter | {answer.home:.4f} |
"""
