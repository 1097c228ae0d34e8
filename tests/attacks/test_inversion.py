"""The span check: a gradient of enough ranks gives its tokens away, a zero one nothing."""

from collections.abc import Callable

import pytest
import torch

from fedllm.attacks.inversion import (
    closest_tokens,
    first_projections,
    message_residuals,
    recovery,
    span_residuals,
    spanned_tokens,
    token_inputs,
)
from fedllm.attacks.token_scores import whole
from fedllm.engine.jobs import Job
from fedllm.messages import LocalTraining

TEXT = (17, 201, 44, 90, 133, 8, 260, 71, 18, 155)
# A query has no gradient at the first token, which can attend to itself only, and at the last, from which
# nothing is predicted.
VISIBLE = set(TEXT[1:-1])


def start_of(engine, zero_b: bool = False) -> torch.Tensor:
    vector = 0.1 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(0))
    if zero_b:
        for _, b in engine.layout.factors(vector):
            b.zero_()
    return vector


def gradient(engine, start: torch.Tensor, texts: tuple[tuple[int, ...], ...] = (TEXT,)) -> torch.Tensor:
    """Return the gradient of one step: what SCAFFOLD's bookkeeping reports of a job, unclipped."""
    training = LocalTraining(
        steps=1, batch_size=len(texts), learning_rate=1e-3, weight_decay=0.0, clip_norm=0.0
    )
    rows = tuple(map(whole, texts))
    (result,) = engine.train([Job("a", start, (rows,), training, correction=torch.zeros_like(start))])
    assert result.gradient is not None
    return result.gradient


def residuals_of(engine, vector: torch.Tensor) -> torch.Tensor:
    inputs = token_inputs(engine.base, engine.layout.matrices[0].module)
    return span_residuals(inputs, engine.layout.factors(vector)[0][0].double())


def test_token_inputs_are_what_the_first_projection_receives(make_exact_engine: Callable) -> None:
    engine = make_exact_engine()
    model = engine.base.model
    inputs = token_inputs(engine.base, engine.layout.matrices[0].module)
    with torch.no_grad():
        wanted = model.model.layers[0].input_layernorm(model.get_input_embeddings().weight)
    torch.testing.assert_close(inputs, wanted)
    assert not model.get_submodule(engine.layout.matrices[0].module)._forward_pre_hooks


def test_one_step_at_enough_ranks_gives_every_token_away(make_exact_engine: Callable) -> None:
    engine = make_exact_engine(rank=16)
    residuals = residuals_of(engine, gradient(engine, start_of(engine)))
    found = spanned_tokens(residuals)
    assert recovery(found, VISIBLE).f1 == 1
    assert closest_tokens(residuals, len(VISIBLE)) == found == VISIBLE


def test_with_fewer_ranks_only_the_closest_tokens_tell(
    make_exact_engine: Callable,
) -> None:
    engine = make_exact_engine(rank=4)
    residuals = residuals_of(engine, gradient(engine, start_of(engine)))
    assert spanned_tokens(residuals) == frozenset()
    assert 0.3 < recovery(closest_tokens(residuals, len(VISIBLE)), VISIBLE).f1 < 1  # chance is 0.03


def test_at_the_first_step_from_zero_b_nothing_is_spanned(make_exact_engine: Callable) -> None:
    engine = make_exact_engine(rank=16)
    residuals = residuals_of(engine, gradient(engine, start_of(engine, zero_b=True)))
    assert residuals.tolist() == [1.0] * len(residuals)
    assert recovery(spanned_tokens(residuals), VISIBLE).f1 == 0


def test_noise_hides_the_span(make_exact_engine: Callable) -> None:
    engine = make_exact_engine(rank=16)
    exact = gradient(engine, start_of(engine))
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0), dtype=exact.dtype)
    residuals = residuals_of(engine, exact + 10 * exact.abs().max() * noise)
    assert recovery(spanned_tokens(residuals), VISIBLE).f1 == 0
    assert recovery(closest_tokens(residuals, len(VISIBLE)), VISIBLE).f1 < 0.3


def test_recovery_counts_each_token_once() -> None:
    found = recovery([1, 1, 2, 3], [2, 3, 4, 5, 4])
    assert (found.precision, found.recall, found.num_found, found.num_true) == (2 / 3, 0.5, 3, 4)
    assert found.f1 == pytest.approx(4 / 7)
    assert recovery([], [1]).f1 == recovery([1], []).f1 == 0


def test_an_update_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        span_residuals(torch.ones(3, 2), torch.full((2, 2), torch.nan))


def test_only_projections_of_the_first_layers_input_are_attacked(make_exact_engine: Callable) -> None:
    assert first_projections(make_exact_engine(targets="q_proj,v_proj").layout) == (0, 1)
    assert first_projections(make_exact_engine(targets="all-linear").layout) == (0, 1, 2)
    assert first_projections(make_exact_engine(targets="o_proj,down_proj").layout) == ()


def test_the_changes_of_several_matrices_span_more_together(make_exact_engine: Callable) -> None:
    engine = make_exact_engine(rank=4, targets="q_proj,k_proj,v_proj")
    layout, start = engine.layout, start_of(engine)
    inputs, change = token_inputs(engine.base, layout.matrices[0].module), gradient(engine, start)
    alone = message_residuals(inputs, layout, start, change, (2,))
    together = message_residuals(inputs, layout, start, change, first_projections(layout))
    torch.testing.assert_close(alone, span_residuals(inputs, layout.factors(change)[2][0]))
    true = set(TEXT[:-1])  # a value has a gradient at the first token too
    assert recovery(spanned_tokens(alone), true).f1 == 0
    assert recovery(spanned_tokens(together), true).f1 > 0.8


def test_a_change_of_b_gives_tokens_away_if_fewer_than_ranks(make_exact_engine: Callable) -> None:
    engine = make_exact_engine(rank=16, targets="v_proj")
    layout, start = engine.layout, start_of(engine)
    change = gradient(engine, start)
    for a, _ in layout.factors(change):
        a.zero_()  # as where B alone is trained
    inputs = token_inputs(engine.base, layout.matrices[0].module)
    residuals = message_residuals(inputs, layout, start, change, first_projections(layout))
    true = set(TEXT[:-1])
    assert recovery(closest_tokens(residuals, len(true)), true).f1 == 1


def test_a_message_of_zeros_says_nothing(make_exact_engine: Callable) -> None:
    engine = make_exact_engine()
    start = start_of(engine)
    inputs = torch.ones(5, 32, dtype=torch.float64)
    found = message_residuals(inputs, engine.layout, start, torch.zeros_like(start), (0,))
    assert found.tolist() == [1.0] * 5
