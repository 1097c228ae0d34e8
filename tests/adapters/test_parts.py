"""Parts of an adapter, ranks of clients, and how the first A is drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.layout import AdapterLayout, LoraMatrix, at_rank, initial_adapter, with_rank
from fedllm.adapters.parts import PARTS, other_part, part_of, part_size, whole_of
from fedllm.errors import ConfigError, LayoutError
from fedllm.plan.dealt_numbers import deal_ranks, named_clients

laws = settings(deadline=None, max_examples=40)


@st.composite
def layouts(draw: st.DrawFn) -> AdapterLayout:
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
    matrices = tuple(LoraMatrix(f"layer.{index}", *shape) for index, shape in enumerate(shapes))
    return AdapterLayout(matrices, draw(st.integers(1, 4)), draw(st.floats(0.5, 64)), "f" * 64)


@laws
@given(layouts(), st.sampled_from(PARTS))
def test_a_part_and_the_rest_make_the_whole(layout: AdapterLayout, part: str) -> None:
    vector = torch.randn(layout.size)
    values, rest = part_of(layout, vector, part), part_of(layout, vector, other_part(part))
    assert values.numel() == part_size(layout, part)
    assert values.numel() + rest.numel() == layout.size
    assert torch.equal(whole_of(layout, values, part, vector), vector)
    alone = whole_of(layout, values, part)
    assert torch.equal(part_of(layout, alone, part), values)
    if part != "both":
        assert torch.equal(alone + whole_of(layout, rest, other_part(part)), vector)


@laws
@given(layouts())
def test_part_a_holds_every_a_and_part_b_every_b(layout: AdapterLayout) -> None:
    vector = torch.zeros(layout.size)
    for a_RD, b_DR in layout.factors(vector):
        a_RD.fill_(1.0)
        b_DR.fill_(2.0)
    assert set(part_of(layout, vector, "a").tolist()) == {1.0}
    assert set(part_of(layout, vector, "b").tolist()) == {2.0}
    assert part_size(layout, "b") == layout.rank * sum(matrix.out_features for matrix in layout.matrices)


@laws
@given(layouts(), st.integers(1, 6))
def test_another_rank_keeps_the_scale(layout: AdapterLayout, rank: int) -> None:
    other = at_rank(layout, rank)
    assert other.rank == rank
    assert other.scale == pytest.approx(layout.scale, rel=1e-15)
    assert at_rank(layout, layout.rank).digest == layout.digest
    start = initial_adapter(layout, 0).vector
    assert with_rank(start, layout, rank).numel() == other.size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"anna": 8, "ben": 8, "cleo": 8}),
        ("4", {"anna": 4, "ben": 4, "cleo": 4}),
        ("4,8", {"anna": 4, "ben": 8, "cleo": 4}),
        (" 1 , 2,3,8", {"anna": 1, "ben": 2, "cleo": 3}),
        ("ben:2", {"anna": 8, "ben": 2, "cleo": 8}),
        ("cleo: 1, anna:4", {"anna": 4, "ben": 8, "cleo": 1}),
    ],
)
def test_ranks_are_dealt_over_sorted_ids_or_given_by_name(text: str, expected: dict[str, int]) -> None:
    assert deal_ranks(text, ("cleo", "anna", "ben"), 8) == expected


@pytest.mark.parametrize(
    "text", ["0", "9", "4,,8", "x", "-1", "1.5", "a:", ":3", "a:4,8", "a:4,a:2", "a:9", ",", "4;8", "a:4:b"]
)
def test_other_ranks_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.client-ranks = ") as caught:
        deal_ranks(text, ("a",), 8)
    assert "\n" not in str(caught.value)


def test_the_clients_that_ranks_name_are_known() -> None:
    assert named_clients("anna:4, ben:2", 8) == ["anna", "ben"]
    assert named_clients("4,8", 8) == named_clients("", 8) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_orthonormal_rows_are_as_long_as_kaiming_rows(seed: int) -> None:
    matrices = (LoraMatrix("a", 64, 5), LoraMatrix("b", 576, 8), LoraMatrix("c", 8, 3))
    layout = AdapterLayout(matrices, 8, 16.0, "f" * 64)
    state, usual = initial_adapter(layout, seed, "orthonormal"), initial_adapter(layout, seed)
    for (a_RD, b_DR), (kaiming_RD, _) in zip(
        layout.factors(state.vector), layout.factors(usual.vector), strict=True
    ):
        torch.testing.assert_close(a_RD @ a_RD.T, torch.eye(8) / 3, rtol=0, atol=1e-6)
        assert float(a_RD.square().sum()) == pytest.approx(float(kaiming_RD.square().sum()), rel=0.5)
        assert int(b_DR.count_nonzero()) == 0
    assert initial_adapter(layout, seed, "orthonormal").digest == state.digest
    assert initial_adapter(layout, seed + 1, "orthonormal").digest != state.digest


def test_more_rows_than_inputs_cannot_be_orthonormal() -> None:
    narrow = AdapterLayout((LoraMatrix("model.gate", 3, 9),), 4, 4.0, "f" * 64)
    with pytest.raises(LayoutError, match=r"lora.init-a = orthonormal: model.gate has 3 inputs"):
        initial_adapter(narrow, 0, "orthonormal")
