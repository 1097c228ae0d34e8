"""What the interpreter runs a compiler for GPUs accepts too."""

import pytest

from tests.builders import compile_kernels


def test_the_kernels_compile_for_a_gpu() -> None:
    pytest.importorskip("triton")
    tile = {"rows": "*fp32", "begins": "*i32", "ends": "*i32", "clients": "*i32"}
    scaled = {**tile, "scales": "*fp32"}
    places = {**dict.fromkeys(("a0", "a1", "a2", "num_inputs"), "i32"), "NUM_RANKS": 24, "BLOCK_J": 32}
    outputs = {**dict.fromkeys(("b0", "b1", "b2", "o0", "o1", "o2"), "i32"), "BLOCK_R": 16}
    sizes = {"R": 8, "BLOCK": 64}
    slots = {"out": "*fp32", "begins": "*i32", "ends": "*i32", "ADD": 1, "PARTS": 1}

    def kernel(values: str, strides: str, *more: dict[str, str | int]) -> dict[str, str | int]:
        found: dict[str, str | int] = dict.fromkeys(values.split(), "*bf16") | {
            f"stride_{name}": "i32" for name in strides.split()
        }
        for part in more:
            found |= part
        return found | sizes

    compile_kernels(
        "fedllm.engine.triton",
        {
            "lora_kernels.activations_kernel": kernel("x z", "x row z", scaled, places),
            "lora_kernels.outputs_kernel": kernel("z y", "z row y", tile, outputs),
            "lora_kernels.activation_gradients_kernel": kernel("g dz", "g row z", scaled, outputs),
            "lora_kernels.input_gradients_kernel": kernel("dz dx", "z row x", tile, places),
            "lora_kernels.grad_b_kernel": kernel("g z", "g z slot part", slots, outputs),
            "lora_kernels.grad_a_kernel": kernel("dz x", "z x slot part", slots, places),
            "cross_entropy._cross_entropy_kernel": {
                **{"logits": "*bf16", "targets": "*i64", "weights": "*fp32", "losses": "*fp32"},
                **{"stride": "i32", "size": "i32", "GRAD": 1, "BLOCK": 4096},
            },
            "adamw._adamw_kernel": {
                **dict.fromkeys(("theta", "grad", "mean", "square", "factors", "rates", "keep"), "*fp32"),
                **dict.fromkeys(("stride_row", "stride_grad", "size"), "i32"),
                **{"correction1": "fp32", "root2": "fp32", "KEEP_EACH": 0, "BLOCK": 2048},
                **{"BETA1": 0.9, "BETA2": 0.999, "EPSILON": 1e-8},
            },
        },
    )
