"""How PEFT reads an adapter: the modules a configuration makes it adapt, the tensors it takes from a folder.

For some types of model PEFT turns names of modules into others (layers that transformers has fused since),
and for some it refuses modules. So PEFT itself is asked what it does, on copies of a model without storage.
"""

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedllm.adapters.layout import AdapterState
from fedllm.errors import IntegrityError

# What `names_for_peft` has found, by the kind of model and the modules that were asked about.
_NAMES: dict[tuple[object, ...], list[str] | None] = {}


def peft_config(
    rank: int, alpha: float, target_modules: Collection[str], *, base_model: str = "", revision: str = ""
) -> Any:
    """Return the peft.LoraConfig of a published adapter, whose values become its `adapter_config.json`."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base_model,
        revision=revision or None,
    )


def modules_peft_adapts(model: Any, config: Any) -> frozenset[str]:
    """Return the names of the modules that PEFT adapts under a peft.LoraConfig; none where it refuses it.

    `model` (transformers.PreTrainedModel, with or without storage) is left as it is. Modules whose update
    PEFT would scale by another factor than alpha / rank are not counted.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    try:
        with _quietly():
            adapted = inject_adapter_in_model(
                copy.deepcopy(config), _meta_copy(model), low_cpu_mem_usage=True
            )
    except (ValueError, TypeError, NotImplementedError):
        return frozenset()
    scaling = config.lora_alpha / config.r
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    return frozenset(name for name, layer in layers.items() if layer.scaling.get("default") == scaling)


def names_for_peft(model: Any, modules: Collection[str]) -> list[str] | None:
    """Return the `target_modules` under which PEFT adapts exactly `modules`, None where there are none.

    They are the last parts of the names where these do, else the whole names. Every client and every run asks
    it of the same few kinds of model, and PEFT takes its time: answers are kept as long as the process lives.
    """
    inside = tuple((name, type(module)) for name, module in model.named_modules())
    asked = (type(model), model.config.to_json_string(use_diff=False), inside, frozenset(modules))
    if asked not in _NAMES:
        _NAMES[asked] = _ask_peft(model, modules)
    names = _NAMES[asked]
    return None if names is None else list(names)


def _ask_peft(model: Any, modules: Collection[str]) -> list[str] | None:
    for names in ({name.rpartition(".")[2] for name in modules}, set(modules)):
        if modules_peft_adapts(model, peft_config(1, 1.0, names)) == set(modules):
            return sorted(names)
    return None


def modules_for_peft(model: Any, modules: Sequence[str]) -> list[str]:
    """Return those of `modules` that PEFT can adapt together and no other with them, in the same order.

    Modules whose names end alike are kept or left out together.
    """
    if names_for_peft(model, modules) is not None:
        return list(modules)
    kinds: dict[str, list[str]] = {}
    for name in modules:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    readable = {kind for kind, names in kinds.items() if names_for_peft(model, names) is not None}
    return [name for name in modules if name.rpartition(".")[2] in readable]


def tensors_peft_reads(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that PEFT's own reader takes from an adapter folder, by their names in the folder.

    No weight of the base model is read, and `model` is left as it is.

    Raises:
        ValueError, RuntimeError, KeyError: PEFT cannot read it.
    """
    from peft import PeftModel, get_peft_model_state_dict

    bare = _meta_copy(model)
    # PEFT puts an adapter where its base layer is: on the CPU, where each tensor is one number repeated.
    repeated = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in bare.state_dict().items()}
    bare.load_state_dict(repeated, assign=True)
    with _quietly():
        read = PeftModel.from_pretrained(bare, str(folder), low_cpu_mem_usage=True, torch_device="cpu")
        # Embeddings are never adapted; PEFT would ask the hub about them.
        tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(read, save_embedding_layers=False)
    # Where the folder lacks a tensor, PEFT warns and leaves a random or empty one.
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


def check_peft_reads(folder: Path, model: Any, state: AdapterState) -> None:
    """Refuse an adapter folder from which PEFT does not read the tensors of `state`, bit for bit.

    Raises:
        IntegrityError: it reads others; the message names the first.
    """
    try:
        read = tensors_peft_reads(folder, model)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise IntegrityError(f"PEFT cannot read the adapter, so it is not published: {cause[:200]}") from None
    trained = state.tensors()
    for name in sorted(trained.keys() | read.keys()):
        if name not in trained or name not in read:
            what = "reads a tensor that was not trained" if name in read else "does not read the tensor"
        elif trained[name].numpy().tobytes() != read[name].contiguous().numpy().tobytes():
            what = "reads other numbers than were trained for"
        else:
            continue
        raise IntegrityError(f"PEFT {what} {name!r}, so the adapter is not published")


def _meta_copy(model: Any) -> Any:
    """Return a model of the same class and configuration whose tensors have no storage."""
    config = copy.deepcopy(model.config)
    # The modules of a quantised model have the names and shapes of the plain one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
