import pytest
import torch

from fedllm.finite import all_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_found(value: float) -> None:
    for place in (0, 500, 999):
        tensor = torch.ones(1000)
        tensor[place] = value
        assert not all_finite(torch.ones(3), tensor)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    assert not all_finite(torch.tensor([float("inf"), -float("inf"), 1.0]))


def test_huge_numbers_whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((1000,), 3e38), torch.empty(0), torch.full((4,), 6e4, dtype=torch.float16))
