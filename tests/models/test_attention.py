"""Attention within the samples of a flat row is each sample's own, however many share a call."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fedllm.models.attention import attend_padded, attend_run_by_run, ragged_attention

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
SAMPLES = ((5, 5), (5, 5), (3, 7), (3, 7), (4, 4), (9, 9))  # (queries, keys)


def flat_row(dtype: torch.dtype, seed: int = 0) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return query, key and value of `SAMPLES` end to end, and what tells them apart."""
    draw = torch.Generator().manual_seed(seed)
    queries, keys = ([0, *torch.tensor(SAMPLES)[:, part].cumsum(0).tolist()] for part in (0, 1))
    shapes = ((queries[-1], HEADS), (keys[-1], KEY_HEADS), (keys[-1], KEY_HEADS))
    tensors = [torch.randn(1, *shape, WIDTH, generator=draw).to(dtype).transpose(1, 2) for shape in shapes]
    lengths = {
        "cu_seq_lens_q": torch.tensor(queries, dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor(keys, dtype=torch.int32),
        "max_length_q": max(size for size, _ in SAMPLES),
        "max_length_k": max(size for _, size in SAMPLES),
    }
    return tensors, lengths


def one_by_one(query: Any, key: Any, value: Any, window: int | None) -> torch.Tensor:
    """Return the attention of each sample by itself, under a mask written out."""
    outputs, begin, key_begin = [], 0, 0
    for num_queries, num_keys in SAMPLES:
        q = query[:, :, begin : begin + num_queries]
        k, v = (tensor[:, :, key_begin : key_begin + num_keys] for tensor in (key, value))
        place, seen = torch.arange(num_keys)[-num_queries:, None], torch.arange(num_keys)[None]
        mask = (seen <= place) & (seen > place - (window or num_keys))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
        begin, key_begin = begin + num_queries, key_begin + num_keys
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attend", [attend_padded, attend_run_by_run])
def test_samples_attend_as_each_does_by_itself(attend: Any, window: int | None) -> None:
    """Outputs and gradients within 1e-12 in float64, with fewer heads of keys and a prefix of keys."""
    tensors, lengths = flat_row(torch.float64)
    found, expected = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    output, wanted = attend(*found, lengths, None, window), one_by_one(*expected, window)
    assert torch.allclose(output, wanted, rtol=0, atol=1e-12)
    weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    (wanted * weights).sum().backward()
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left.grad, right.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", [attend_padded, attend_run_by_run])
def test_nan_of_one_sample_reaches_no_other(attend: Any) -> None:
    """Neither forward nor back, whichever sample it is in."""
    tensors, lengths = flat_row(torch.float32)
    begins, key_begins = lengths["cu_seq_lens_q"].tolist(), lengths["cu_seq_lens_k"].tolist()
    for spoilt in range(len(SAMPLES)):
        leaves = [tensor.clone() for tensor in tensors]
        own, own_keys = (slice(ends[spoilt], ends[spoilt + 1]) for ends in (begins, key_begins))
        for leaf, part in zip(leaves, (own, own_keys, own_keys), strict=True):
            leaf[:, :, part] = float("nan")
            leaf.requires_grad_()
        output = attend(*leaves, lengths, None, None)
        output.sum().backward()
        assert output[:, own].isnan().all()
        assert output.isnan().sum() == output[:, own].numel()
        for leaf, part in zip(leaves, (own, own_keys, own_keys), strict=True):
            assert leaf.grad is not None
            assert leaf.grad.isnan().sum() == leaf.grad[:, :, part].isnan().sum()


def test_half_precision_is_attended_in_float32_on_a_cpu() -> None:
    """The output is that of the same numbers in float32, rounded once."""
    tensors, lengths = flat_row(torch.bfloat16)
    output = attend_run_by_run(*tensors, lengths, None, None)
    exact = attend_run_by_run(*(tensor.float() for tensor in tensors), lengths, None, None)
    assert torch.equal(output, exact.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_a_gpu_attends_as_a_cpu_does(dtype: torch.dtype, bound: float, window: int | None) -> None:
    """Outputs and gradients, by the flash kernel of samples of many lengths and by the padded call."""
    tensors, lengths = flat_row(dtype)
    there = [tensor.cuda().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    places = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in lengths.items()}
    output, _ = ragged_attention(None, *there, None, sliding_window=window, **places)
    wanted = one_by_one(*exact, window)
    output.float().sum().backward()
    wanted.sum().backward()
    assert torch.allclose(output.cpu().double(), wanted, rtol=0, atol=bound)
    for left, right in zip(there, exact, strict=True):
        assert left.grad is not None
        assert right.grad is not None
        assert torch.allclose(left.grad.cpu().double(), right.grad, rtol=bound, atol=bound)
