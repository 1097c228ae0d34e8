"""Finds out how a base model is run: kernel, trunk, head, and whether samples may share a pass."""

import logging
from dataclasses import replace
from functools import partial

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.engine.adapter_bank import Bank
from fedllm.engine.decoder_probe import own_trunk
from fedllm.engine.flat_row import predicting_states
from fedllm.engine.graphs import Shelf, record_on_gpu
from fedllm.engine.kernel_choice import choose_kernel
from fedllm.engine.passes import Passes
from fedllm.engine.probe import can_be_ragged, check_causal, plain_head
from fedllm.engine.recorded_inputs import RecordedInputs
from fedllm.models.base import BaseModel

_logger = logging.getLogger("fedllm.training")


def open_passes(base: BaseModel, layout: AdapterLayout) -> Passes:
    """Return what runs passes of `base` under adapters of `layout`.

    Raises:
        ModelError: the model's tokens see those after them.
    """
    # Adapters are trained in float32, also on a bfloat16 base; float64 is for exactness tests.
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    if base.device.type == "cuda" and base.device.index is not None:
        torch.cuda.set_device(base.device)  # Triton launches on the current one
    kernel = choose_kernel(layout, base.device, base.dtype)
    check_causal(base.model, base.device)
    is_ragged = can_be_ragged(base.model, base.device)
    if not is_ragged:
        kind = type(base.model).__name__
        _logger.warning("%s cannot attend over a flat row: its samples are trained one at a time", kind)
    head = plain_head(base.model, base.device)
    trunk = partial(predicting_states, base.model, head=head)
    passes = Passes(base, Bank(layout, kernel, base.device, dtype), trunk, head, is_ragged)
    own = own_trunk(passes)
    is_gpu = base.device.type == "cuda"
    shelf = Shelf[RecordedInputs](partial(record_on_gpu, base.device)) if is_gpu else None
    return replace(passes, trunk=trunk if own is None else own, shelf=shelf)
