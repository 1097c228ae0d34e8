import pytest
import torch

from fedllm.adapters.layout import AdapterLayout, LoraMatrix
from fedllm.engine.adapter_bank import Kernel
from fedllm.engine.kernel_choice import PREFERRED, choose_kernel, preferred
from fedllm.engine.kernels import LoopKernel, MaskedKernel

LAYOUT = AdapterLayout((LoraMatrix("a", 576, 1536), LoraMatrix("b", 1536, 576)), 8, 16.0, "base")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_cpu_takes_the_loop_whatever_the_dtype(dtype: torch.dtype) -> None:
    assert isinstance(choose_kernel(LAYOUT, torch.device("cpu"), dtype), LoopKernel)


@pytest.mark.parametrize(("factor", "keeps_apart"), [(PREFERRED - 0.1, True), (PREFERRED + 0.1, False)])
def test_dense_products_must_be_much_faster(factor: float, keeps_apart: bool) -> None:
    pytest.importorskip("triton")
    kernel = preferred(lambda kernel: factor if kernel.keeps_rows_apart else 1.0)
    assert kernel.keeps_rows_apart == keeps_apart


def test_where_memory_is_too_short_to_time_kernels_one_is_taken() -> None:
    pytest.importorskip("triton")

    def seconds(kernel: Kernel) -> float:
        raise torch.OutOfMemoryError

    assert preferred(seconds).keeps_rows_apart


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_kernel_is_found_once(dtype: torch.dtype) -> None:
    kernel = choose_kernel(LAYOUT, torch.device("cuda"), dtype)
    assert not isinstance(kernel, LoopKernel)
    assert choose_kernel(LAYOUT, torch.device("cuda"), dtype) is kernel


@pytest.mark.gpu
def test_a_gpu_takes_dense_products_in_float64() -> None:
    assert isinstance(choose_kernel(LAYOUT, torch.device("cuda"), torch.float64), MaskedKernel)
