"""The loss of a flat row is the loss transformers computes on padded rows."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedllm.adapters.layout import initial_adapter
from fedllm.engine.flat_row import SHORTEST_SHARED, lay_out, token_losses
from fedllm.engine.head import CrossEntropy, Head, head_loss
from fedllm.engine.jobs import EvaluationJob
from fedllm.models.attention import ragged
from fedllm.models.chat import IGNORED, Encoded

CPU = torch.device("cpu")


def summed_loss(model: Any, flat: Any, *, through_head: bool = True) -> torch.Tensor:
    """Return the sum of the token losses of a flat row."""
    weights, layer = torch.ones(len(flat.targets_N), dtype=model.dtype), model.get_output_embeddings()
    head = Head(layer.weight, layer.bias) if through_head else Head()
    return token_losses(model, flat, head, weights)[0]


def padded_loss(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    """Return the mean loss the textbook way; transformers' own must agree, but it is in float32."""
    length = max(len(row.tokens) for row in rows)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (length - len(values))]

    labels = torch.tensor([padded(row.labels, IGNORED) for row in rows])
    output = model(
        input_ids=torch.tensor([padded(row.tokens, 0) for row in rows]),
        labels=labels,
        attention_mask=torch.tensor([padded([1] * len(row.tokens), 0) for row in rows]),
    )
    loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=0)
    return loss


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("lengths", [[13], [5, 21, 2, 9], [8, 9, 8], [30, 30]])
def test_a_flat_rows_loss_is_the_padded_batchs(
    kind: str, lengths: list[int], load_tiny: Callable, make_rows: Callable
) -> None:
    model, rows = load_tiny(kind, "float64").model, make_rows(lengths)
    num_supervised = sum(row.num_supervised for row in rows)
    with torch.no_grad():
        expected = padded_loss(model, rows)
        with ragged(model):
            flat = lay_out(rows, CPU)
            losses = [
                summed_loss(model, flat, through_head=apart) / num_supervised for apart in (True, False)
            ]
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def common_beginning(rows: Sequence[Encoded], prefix: Encoded) -> list[Encoded]:
    return [Encoded(prefix.tokens + row.tokens, prefix.labels + row.labels) for row in rows]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("length", [SHORTEST_SHARED, 19])
def test_rows_that_share_a_prefix_have_the_padded_batchs_loss(
    kind: str, length: int, load_tiny: Callable, make_rows: Callable
) -> None:
    """The prefix is longer than gemma3's window of attention, and partly learnt."""
    model = load_tiny(kind, "float64").model
    (prefix,) = make_rows([length], seed=5)
    rows = common_beginning(make_rows([5, 21, 1, 9]), prefix)
    flat = lay_out(rows, CPU, [0] * len(rows))
    assert len(flat.tokens_T) == length + 5 + 21 + 1 + 9
    with torch.no_grad():
        expected = padded_loss(model, rows)
        with ragged(model):
            loss = summed_loss(model, flat) / sum(row.num_supervised for row in rows)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_only_neighbours_of_one_owner_share_a_prefix(make_rows: Callable) -> None:
    (prefix,) = make_rows([SHORTEST_SHARED], seed=5)
    rows = common_beginning(make_rows([3, 4, 5, 6]), prefix)
    whole = sum(len(row.tokens) for row in rows)
    assert len(lay_out(rows, CPU).tokens_T) == whole
    assert len(lay_out(rows, CPU, "abab").tokens_T) == whole
    shared = lay_out(rows, CPU, "aabb")
    assert len(shared.tokens_T) == whole - 2 * SHORTEST_SHARED
    assert shared.keys_Q.diff().tolist() == [8, 11, 12, 8, 13, 14]
    assert lay_out([rows[0]] * 3, CPU, "aaa").queries_Q.diff().tolist() == [10, 1, 1, 1]  # one each is kept


def test_held_out_loss_is_the_mean_over_supervised_tokens(make_engine: Callable, make_rows: Callable) -> None:
    engine, rows = make_engine("llama", "float64"), make_rows([5, 21, 2, 9])
    with torch.no_grad():
        expected = float(padded_loss(engine.base.model, rows))
    (measured,) = engine.evaluate([EvaluationJob("a", initial_adapter(engine.layout, 0).vector, rows)])
    assert measured.loss == pytest.approx(expected, rel=1e-12)
    assert measured.num_tokens == sum(row.num_supervised for row in rows)
    assert (measured.client_id, measured.num_rows) == ("a", 4)


def test_rows_of_a_flat_row_do_not_see_each_other(load_tiny: Callable, make_rows: Callable) -> None:
    model = load_tiny("llama", "float64").model
    first, second, third = make_rows([7, 11, 5])
    (other,) = make_rows([11], seed=9)
    with torch.no_grad(), ragged(model):
        losses = [
            summed_loss(model, lay_out(rows, CPU))
            for rows in ([first, second, third], [first, other, third], [second], [other])
        ]
    torch.testing.assert_close(losses[0] - losses[2], losses[1] - losses[3], rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
def test_every_learnt_token_is_predicted_from_the_one_before_it(drawn: list) -> None:
    rows = [
        Encoded(
            tuple(token for token, _ in row),
            tuple(token if learnt else IGNORED for token, learnt in row),
        )
        for row in drawn
    ]
    flat = lay_out(rows, CPU)
    assert flat.learnt_B.diff().tolist() == [row.num_supervised for row in rows]
    assert flat.tokens_T.tolist() == [token for row in rows for token in row.tokens]
    assert flat.positions_T.tolist() == [index for row in rows for index in range(len(row.tokens))]
    assert flat.queries_Q.diff().tolist() == [len(row.tokens) for row in rows]
    assert len(flat.predicting_N) == sum(row.num_supervised for row in rows)
    begins = set(flat.queries_Q.tolist())
    for where, target in zip(flat.predicting_N.tolist(), flat.targets_N.tolist(), strict=True):
        assert where + 1 not in begins
        assert int(flat.tokens_T[where + 1]) == target


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 700), seed=st.integers(0, 99), has_bias=st.booleans())
def test_the_chunked_head_is_cross_entropy_with_its_gradient(count: int, seed: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, bias = random(11, 4), random(11) if has_bias else None
    targets, weights = torch.randint(11, (count,), generator=generator), random(count).abs()
    mine, theirs = (hidden.requires_grad_() for hidden in [random(count, 4)] * 2)
    mine = mine.detach().clone().requires_grad_()
    loss, losses = head_loss(mine, Head(weight, bias), CrossEntropy(targets), weights)
    expected = cross_entropy(torch.nn.functional.linear(theirs, weight, bias), targets, reduction="none")
    (expected * weights).sum().mul(3).backward()
    (3 * loss).backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, (expected * weights).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
