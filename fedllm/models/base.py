"""The frozen base model: which device and dtype it gets, how it is loaded, and which layers LoRA adapts."""

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedllm.adapters.layout import AdapterLayout, LoraMatrix
from fedllm.adapters.peft_reading import modules_for_peft, names_for_peft
from fedllm.config.keys import LoraConfig, ModelConfig
from fedllm.errors import LayoutError, MissingExtraError, ModelError
from fedllm.models import half_precision
from fedllm.models.chat import check_template
from fedllm.models.files import ModelFiles, fingerprint, first_line, quiet_transformers, resolve_model


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen causal language model with its tokenizer; nothing here is ever trained."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    files: ModelFiles
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    # The newest sums of weights and base delta, for `with_base_delta`: they live as long as the weights.
    sums: dict[Any, dict[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class ChosenModel:
    """Which files are loaded and how: all that makes two loaded base models differ."""

    files: ModelFiles
    device: torch.device
    dtype: torch.dtype
    quantization: str
    checkpointing: bool


@dataclass(frozen=True, eq=False)
class PlainLinear:
    """A linear layer that computes W x + b and nothing else."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None


def load_base(config: ModelConfig) -> BaseModel:
    """Load the base model for `config` with its tokenizer; `Resident` keeps one for a whole process.

    Raises:
        ModelError: the model is absent, unreadable, or does not fit what this machine can hold.
        MissingExtraError: quantisation is asked for without bitsandbytes.
    """
    chosen = choose_model(config)
    return load_chosen(chosen, load_tokenizer(chosen.files))


def choose_model(config: ModelConfig) -> ChosenModel:
    """Return what `config` means on this machine, and let torch use the threads it names; nothing is loaded.

    Raises:
        ModelError: the model's files are absent, or the device or what quantises for it is not here.
        MissingExtraError: quantisation is asked for without bitsandbytes.
    """
    if isinstance(config.num_threads, int):
        torch.set_num_threads(config.num_threads)
    device = choose_device(config.device)
    _check_quantization(config.quantization, device)
    files = resolve_model(config.name)
    dtype = choose_dtype(config.dtype, device, files)
    return ChosenModel(files, device, dtype, config.quantization, config.gradient_checkpointing)


def how_held(config: ModelConfig) -> dict[str, str]:
    """Return the type of the weights and the device that `config` means here; {} if neither can be had."""
    with suppress(ModelError, MissingExtraError):  # a server need not hold what its nodes do
        chosen = choose_model(config)
        return {"dtype": str(chosen.dtype).removeprefix("torch."), "device": str(chosen.device)}
    return {}


def load_chosen(chosen: ChosenModel, tokenizer: Any) -> BaseModel:
    """Load a base model; its tokenizer is there already. Raises as `load_base`."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    files, device, dtype = chosen.files, chosen.device, chosen.dtype
    extra: dict[str, Any] = {"trust_remote_code": files.runs_own_code}
    if chosen.quantization != "none":
        extra["quantization_config"] = _quantization(chosen.quantization, dtype)
    if device.type == "cuda":  # read from the file to the GPU, without a copy in the memory of the CPU
        extra["device_map"] = {"": device}
    try:
        with quiet_transformers():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                files.folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **extra
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unreadable("cannot load", files, error) from None
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        first = min(loaded["missing_keys"])
        raise ModelError(f"{files.public_name}: tensor {first!r} is missing from its weights")
    model.requires_grad_(False)
    model.eval()  # no dropout but the adapters' own
    if chosen.quantization == "none":
        model.to(device)
    if chosen.checkpointing:
        _checkpoint_layers(model)
    return BaseModel(model, tokenizer, files, fingerprint(files.folder), device, dtype)


def load_tokenizer(files: ModelFiles) -> Any:
    """Return the tokenizer of a model; no weight is loaded.

    Raises:
        ModelError: it is absent, cannot report where in the text a token stands, or its chat template is
            broken.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=files.runs_own_code)
    except Exception as error:  # the tokenizers library raises Exception itself for a damaged file
        raise _unreadable("no tokenizer in", files, error) from None
    if not tokenizer.is_fast:
        raise ModelError(f"{files.public_name} has no fast tokenizer, which the label mask needs")
    check_template(tokenizer)
    return tokenizer


def _unreadable(what: str, files: ModelFiles, error: Exception) -> ModelError:
    """Return the error for a model that transformers does not open, with what its own code would need."""
    if files.code_entry and not files.runs_own_code:
        return ModelError(
            f"{what} {files.public_name}: it brings Python code of its own, which does not run here; to"
            f' permit it, add "{files.code_entry}" to trust-remote-code in this machine\'s policy file'
        )
    return ModelError(f"{what} {files.public_name}: {first_line(error)}")


def choose_device(name: str) -> torch.device:
    """Return the device for `model.device`; "auto" is the GPU where there is one.

    Raises:
        ModelError: the named device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = None
    with suppress(RuntimeError):  # torch knows no such device
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"model.device = {name!r}: expected auto, cpu or cuda[:N]")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices here, counted from 0"
        raise ModelError(f"model.device = {name!r}: {found}; use auto or cpu, or one of those")
    return device


def choose_dtype(name: str, device: torch.device, files: ModelFiles | None = None) -> torch.dtype:
    """Return the base model's dtype; "auto" is bfloat16 on a GPU, and on a CPU that is faster in it.

    On a CPU that depends on the model's `files`, and is measured; without them it is float32.
    """
    if name == "auto":
        is_half = device.type == "cuda" or (files is not None and half_precision.pays(files))
        return torch.bfloat16 if is_half else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def open_skeleton(files: ModelFiles) -> Any:
    """Return a base model of names and shapes alone (transformers.PreTrainedModel): no weight is read.

    Raises:
        ModelError: the files are of an architecture transformers does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=files.runs_own_code)
        with torch.device("meta"):  # shapes without storage
            return AutoModelForCausalLM.from_config(config, trust_remote_code=files.runs_own_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable("cannot read", files, error) from None


def describe_layout(
    model: ModelConfig, lora: LoraConfig, notice: Callable[[str], None] = lambda line: None
) -> AdapterLayout:
    """Return the adapter layout of a base model from its files alone: no weight is loaded.

    `notice` hears of the layers that "all-linear" leaves out.

    Raises:
        ModelError: the model's files are absent or of an architecture transformers does not know, or PEFT
            could not read an adapter of `lora.target_modules`.
        LayoutError: `lora.target_modules` matches no linear layer.
    """
    files = resolve_model(model.name)
    skeleton = open_skeleton(files)
    # transformers marks every attention; one model may also have some over what it was given to look at.
    causal = [module.is_causal for module in skeleton.modules() if hasattr(module, "is_causal")]
    if causal and not any(causal):
        raise not_causal(skeleton)
    layout = layout_of(skeleton, lora, fingerprint(files.folder))
    if lora.target_modules == "all-linear":
        adapted = {matrix.module for matrix in layout.matrices}
        if left_out := sorted({_kind(name) for name in _linear_layers(skeleton).keys() - adapted}):
            notice(f"not adapted, since PEFT cannot read adapters of them here: {', '.join(left_out)}")
    return layout


def not_causal(model: Any) -> ModelError:
    """Return the error for a model whose tokens see later ones, as BERT's do."""
    kind, name = type(model).__name__, model.config.model_type
    return ModelError(
        f"model.name: {kind} ({name}) is not causal: a token sees those after it, so the answers it should"
        " learn would be shown to it; take a model that writes from left to right"
    )


def layout_of(model: Any, lora: LoraConfig, base_fingerprint: str) -> AdapterLayout:
    """Return the layout that `lora` describes on `model`, in the model's own module order."""
    matrices = tuple(
        LoraMatrix(name, *linear_shape(module))
        for name, module in target_modules(model, lora.target_modules).items()
    )
    return AdapterLayout(matrices, lora.rank, lora.alpha, base_fingerprint)


def check_fits(layout: AdapterLayout, base: BaseModel) -> None:
    """Refuse a layout of another base model: its adapters would change the wrong weights.

    Raises:
        LayoutError: the fingerprints differ.
    """
    if layout.fingerprint != base.fingerprint:
        raise LayoutError(
            f"the run's base model ({layout.fingerprint[:12]}) is not the one on this machine"
            f" ({base.fingerprint[:12]}); use the model, revision and tokenizer the run names"
        )


def target_modules(model: Any, targets: str) -> dict[str, nn.Module]:
    """Return the linear layers that `targets` selects, by module name.

    "all-linear" is every linear layer but the output head, as in PEFT, and but those of which PEFT could not
    read an adapter; otherwise a comma-separated list of module names, matched at the end of the full name.

    Raises:
        ModelError: a name matches no linear layer, or PEFT could not read an adapter of the layers named.
    """
    linear = _linear_layers(model)
    if targets == "all-linear":
        return {name: linear[name] for name in modules_for_peft(model, list(linear))}
    found: set[str] = set()
    for suffix in (part.strip() for part in targets.split(",") if part.strip()):
        named = {name for name in linear if f".{name}".endswith(f".{suffix}")}  # whole parts of a dotted name
        if not named:
            kinds = sorted({_kind(name) for name in linear})
            raise ModelError(
                f"lora.target-modules: no linear layer named {suffix!r}; this model has {', '.join(kinds)}"
            )
        found |= named
    if found and names_for_peft(model, found) is None:
        unread = found - set(modules_for_peft(model, sorted(found)))
        kinds = sorted({_kind(name) for name in unread or found})
        raise ModelError(
            f"lora.target-modules: PEFT cannot read an adapter of {', '.join(kinds)} in a model of type"
            f" {model.config.model_type}; name other layers, or use all-linear"
        )
    return {name: module for name, module in linear.items() if name in found}


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    body, head = set(model.base_model.modules()), model.get_output_embeddings()
    # Some heads have a layer before the last one, which sees only the tokens whose logits are wanted.
    return {n: m for n, m in model.named_modules() if m in body and is_linear(m) and m is not head}


def _kind(name: str) -> str:
    """Return the last part of a module's name, which the layers of one kind share."""
    return name.rpartition(".")[2]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that LoRA can wrap: nn.Linear (quantised too) or Conv1D."""
    from transformers.pytorch_utils import Conv1D

    if not type(module).__module__.startswith("transformers.models."):
        return isinstance(module, nn.Linear | Conv1D)
    return isinstance(module, nn.Linear) and _gives_a_product(module)


def _gives_a_product(layer: nn.Linear) -> bool:
    """Return whether an architecture's own kind of linear layer takes and gives what its shape says.

    A mixture's router may be one that gives its choice of experts too.
    """
    row_I = layer.weight.new_zeros(1, layer.in_features)
    with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError):
        output = layer(row_I)
        return isinstance(output, torch.Tensor) and output.shape == (1, layer.out_features)
    return False


def linear_shape(module: Any) -> tuple[int, int]:
    """Return (in_features, out_features); GPT-2's Conv1D stores its weight transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.weight.shape[0], module.weight.shape[1]


def plain_linear(layer: Any) -> PlainLinear | None:
    """Return a layer's weight and bias, or None where it computes anything else (a quantised one, say)."""
    from transformers.pytorch_utils import Conv1D

    if type(layer) is nn.Linear:
        return PlainLinear(layer.weight, layer.bias)
    if type(layer) is Conv1D:  # stored [D_in, D_out]
        return PlainLinear(layer.weight.T, layer.bias)
    return None


def _checkpoint_layers(model: Any) -> None:
    """Recompute decoder layers in the backward pass instead of keeping their activations.

    transformers does so only for layers in training mode, which would also switch on their dropout: a layer's
    own is set to zero, and the modules inside it stay in evaluation mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)


def _check_quantization(kind: str, device: torch.device) -> None:
    if kind == "none":
        return
    if device.type != "cuda":
        raise ModelError(f"model.quantization = {kind!r} needs a GPU; set it to none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"model.quantization = {kind!r} needs `pip install bitsandbytes`")


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # as in QLoRA, arXiv 2305.14314
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
