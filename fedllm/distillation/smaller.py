"""A smaller student: some layers of a large model, with its tokenizer and embeddings.

Which layers go matters more than how many: those that turn their input least (the angular distance of arXiv
2403.17887, for one layer at a time), never the first or the last two. The student is an ordinary model of the
same architecture and vocabulary, so targets of a teacher on the large model fit it as they are:
`fedllm.distillation.student.distil` teaches it an adapter, `distil_layers` its own layers.
Tensor suffixes: N supervised token.
"""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedllm.distillation.student import StudentTraining, student_batches
from fedllm.distillation.targets import Targets
from fedllm.engine.flat_row import lay_out, token_losses
from fedllm.engine.probe import can_be_ragged, plain_head
from fedllm.errors import ConfigError, ModelError, NoDataError, NonFiniteError
from fedllm.models.attention import ragged
from fedllm.models.base import BaseModel
from fedllm.models.chat import Encoded

NUM_LAST = 2  # layers at the end that stay; so does the first


@torch.no_grad()
def layer_angles(base: BaseModel, rows: Sequence[Encoded]) -> tuple[float, ...]:
    """Return how far each layer turns its input: the mean angle over all tokens, as a share of half a turn.

    Raises:
        ModelError: the model is no stack of decoder layers.
        NoDataError: there is no row.
    """
    if not rows:
        raise NoDataError("cutting a student needs some text to see what its layers do")
    layers = decoder_layers(base.model)
    sums, count = [0.0] * len(layers), 0

    def watch(place: int) -> Any:
        def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosines = torch.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
            sums[place] += float(cosines.clamp(-1, 1).arccos().sum() / torch.pi)

        return note

    handles = [layer.register_forward_hook(watch(place)) for place, layer in enumerate(layers)]
    try:
        for row in rows:
            base.model(input_ids=torch.tensor([row.tokens], device=base.device), use_cache=False)
            count += len(row.tokens)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(total / count for total in sums)


def layers_to_keep(angles: Sequence[float], num_dropped: int) -> tuple[int, ...]:
    """Return the layers that stay when the `num_dropped` that turn their input least are dropped.

    Raises:
        ConfigError: there are not that many layers that may go.
    """
    may_go = range(1, len(angles) - NUM_LAST)
    if not 0 <= num_dropped <= len(may_go):
        raise ConfigError(f"of {len(angles)} layers at most {len(may_go)} can go, not {num_dropped}")
    gone = sorted(may_go, key=lambda place: angles[place])[:num_dropped]
    return tuple(place for place in range(len(angles)) if place not in gone)


def cut(base: BaseModel, kept: Sequence[int]) -> BaseModel:
    """Return a new model with the layers `kept` of `base`, in that order, and a fingerprint of its own.

    Raises:
        ModelError: the model is no stack of decoder layers, or is quantised.
    """
    model, layers = base.model, decoder_layers(base.model)
    if getattr(model, "quantization_method", None) is not None:
        raise ModelError("a quantised model cannot be cut; set model.quantization = none")
    config = deepcopy(model.config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = len(kept)
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = [text_config.layer_types[place] for place in kept]
    student = type(model)(config).to(device=base.device, dtype=base.dtype)
    copies = decoder_layers(student)
    in_layers = {id(parameter) for layer in copies for parameter in layer.parameters()}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if id(parameter) not in in_layers:  # embeddings, the last norm and the head have their old names
                parameter.copy_(model.get_parameter(name))
    for copied, place in zip(copies, kept, strict=True):
        copied.load_state_dict(layers[place].state_dict())
    student.generation_config = deepcopy(model.generation_config)
    student.requires_grad_(False)
    student.eval()
    fingerprint = hashlib.sha256(f"{base.fingerprint} layers {list(kept)}".encode()).hexdigest()
    return replace(base, model=student, fingerprint=fingerprint)


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder's layers, first to last.

    Raises:
        ModelError: they are not where Llama and its like have them.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        kind = type(model).__name__
        raise ModelError(f"{kind} cannot be cut: its decoder has no list of layers; take a Llama-like model")
    return layers


def distil_layers(student: BaseModel, targets: Targets, training: StudentTraining) -> tuple[float, ...]:
    """Train the student's own layers, in place, to predict what the teacher does; return each step's loss.

    Embeddings and head stay as they are.

    Raises:
        NonFiniteError: training diverged.
    """
    model = student.model
    together, head = can_be_ragged(model, student.device), plain_head(model, student.device)
    parameters = list(decoder_layers(model).parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.999)
    )
    losses: list[float] = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with ragged(model) if together else nullcontext():
            for batch in student_batches(targets.rows, training):
                num_learnt = sum(row.num_supervised for row in batch)
                optimizer.zero_grad()
                losses.append(0.0)
                # Rows share a pass where the model can keep them apart, else each has its own.
                for rows in (batch,) if together else tuple((row,) for row in batch):
                    flat = lay_out(rows, student.device)
                    weights_N = torch.full(flat.targets_N.shape, 1 / num_learnt, device=student.device)
                    criterion = targets.criterion(rows, student.device)
                    loss, _ = token_losses(model, flat, head, weights_N, criterion)
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses[-1] += float(loss.detach())
                if training.clip_norm:
                    nn.utils.clip_grad_norm_(parameters, training.clip_norm)
                optimizer.step()
    finally:
        model.requires_grad_(False)
        optimizer.zero_grad()
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise NonFiniteError("teaching the student's layers diverged; lower its learning rate")
    return tuple(losses)
