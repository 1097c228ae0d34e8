import pytest
import torch

from fedllm.adapters.layout import AdapterLayout, LoraMatrix
from fedllm.engine.kernel_choice import choose_kernel
from fedllm.engine.kernels import LoopKernel, MaskedKernel

LAYOUT = AdapterLayout((LoraMatrix("a", 576, 1536), LoraMatrix("b", 1536, 576)), 8, 16.0, "base")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_cpu_takes_the_loop_whatever_the_dtype(dtype: torch.dtype) -> None:
    assert isinstance(choose_kernel(LAYOUT, torch.device("cpu"), dtype), LoopKernel)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_takes_a_kernel_that_keeps_rows_apart(dtype: torch.dtype) -> None:
    kernel = choose_kernel(LAYOUT, torch.device("cuda"), dtype)
    assert kernel.keeps_rows_apart
    assert choose_kernel(LAYOUT, torch.device("cuda"), dtype) is kernel


@pytest.mark.gpu
def test_a_gpu_takes_dense_products_in_float64() -> None:
    assert isinstance(choose_kernel(LAYOUT, torch.device("cuda"), torch.float64), MaskedKernel)
