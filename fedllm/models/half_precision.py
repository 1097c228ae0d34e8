"""Whether a CPU computes a base model faster in bfloat16: with matrix units it does, others are far slower.

Measured on products of the model's own shapes, once for each model and machine, so that a run that is resumed
goes on in the type it began in.
"""

import hashlib
import platform
import time
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import linear

from fedllm.models.files import ModelFiles
from fedllm.models.measured import remembered

SMALLEST = 50_000_000  # weights; calls cost more than arithmetic below
ENOUGH = 1.5  # times float32's rate of products: they are about two thirds of a step
_TOKENS = 512
# One layer of SmolLM2-135M: what a machine can do, where no model is asked about.
TYPICAL = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}

Shapes = Mapping[tuple[int, int], int]  # how many weights of each shape [O, I] there are


@cache
def pays(files: ModelFiles) -> bool:
    """Return whether this CPU's products of the model's shapes are fast enough in bfloat16 to pay."""
    if not _may_have_units() or _size_on_disk(files.folder) < 2 * SMALLEST:  # 16 bits a weight, or more
        return False
    shapes = shapes_of(files.folder)
    if sum(rows * columns * number for (rows, columns), number in shapes.items()) < SMALLEST:
        return False
    layers = {shape: number for shape, number in shapes.items() if number > 1}  # no embedding, no head
    described = repr((sorted(layers.items()), platform.node(), torch.__version__))
    key = hashlib.sha256(described.encode()).hexdigest()
    percent = remembered("cpu-bfloat16.json", key, lambda: max(1, round(100 * gain(layers))))
    return percent >= 100 * ENOUGH


def machine_gain() -> float:
    """Return how many times float32's rate of products this CPU reaches in bfloat16; 0 without any units."""
    return gain(TYPICAL) if _may_have_units() else 0.0


def gain(shapes: Shapes) -> float:
    """Return float32's CPU seconds for products of such weights, over those of bfloat16."""
    types = (torch.float32, torch.bfloat16)
    best = [{shape: float("inf") for shape in shapes} for _ in types]
    for shape in shapes:
        weights = [torch.ones(shape, dtype=dtype) for dtype in types]
        for _ in range(4):  # in turns, so that other programs disturb both; the first also prepares
            for seconds, weight in zip(best, weights, strict=True):
                seconds[shape] = min(seconds[shape], _seconds(weight))
    exact, half = (sum(seconds[shape] * number for shape, number in shapes.items()) for seconds in best)
    return exact / half if half else 0.0


def shapes_of(folder: Path) -> Counter[tuple[int, int]]:
    """Return the shapes of a model's matrices, from the headers of its files; none if one is damaged."""
    from safetensors import SafetensorError, safe_open

    shapes: Counter[tuple[int, int]] = Counter()
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                sizes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118
                shapes.update((size[0], size[1]) for size in sizes if len(size) == 2)
    except (OSError, SafetensorError):  # loading the model will say so
        return Counter()
    return shapes


def _may_have_units() -> bool:
    """Return whether a measurement is worth it: no AVX2 has anything for bfloat16."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.inference_mode()
def _seconds(weight_OI: torch.Tensor) -> float:
    """Return the CPU seconds of a product forward and one back: other programs disturb the clock."""
    x_TI = weight_OI.new_ones(_TOKENS, weight_OI.shape[1])
    began = time.process_time()
    linear(x_TI, weight_OI) @ weight_OI
    return time.process_time() - began
