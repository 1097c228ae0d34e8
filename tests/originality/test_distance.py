"""Distance to the closest record: copies are close, held-out text is the measure."""

from collections.abc import Callable

import pytest
import torch

from fedllm.attacks.token_scores import whole
from fedllm.models.chat import Encoded
from fedllm.originality.distance import closest, distance_ratio, mean_pooled, too_close


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_pooled_states_are_the_means_of_the_last_hidden_states(
    kind: str, make_engine: Callable, random_texts: Callable
) -> None:
    engine, texts = make_engine(kind), random_texts([12, 30, 5])
    pooled = mean_pooled(engine, [whole(text) for text in texts])
    with torch.no_grad():
        decoder = engine.base.model.get_decoder()
        wanted = [decoder(torch.tensor([text])).last_hidden_state[0].mean(dim=0) for text in texts]
    torch.testing.assert_close(pooled, torch.stack(wanted), rtol=1e-4, atol=1e-5)


def rows_of(texts: list[tuple[int, ...]]) -> list[Encoded]:
    return [whole(text) for text in texts]


def test_copied_text_is_too_close_and_fresh_text_is_not(
    make_engine: Callable, random_texts: Callable
) -> None:
    engine = make_engine()
    train = random_texts([40] * 60)
    held_out, fresh = random_texts([40] * 60, seed=1), random_texts([40] * 60, seed=2)
    copied = [(*text[:38], 7, 8) for text in train[:30]]  # two tokens changed
    reference = mean_pooled(engine, rows_of(train))
    apart = {
        name: closest(mean_pooled(engine, rows_of(texts)), reference)
        for name, texts in {"held-out": held_out, "fresh": fresh, "copied": copied}.items()
    }
    same, copies = (distance_ratio(apart[name], apart["held-out"]) for name in ("fresh", "copied"))
    assert same.is_original
    assert same.low < 1 < same.high
    assert not copies.is_original
    assert copies.ratio < 0.7
    assert sum(too_close(apart["copied"], apart["held-out"])) > 25
    assert sum(too_close(apart["fresh"], apart["held-out"])) < 5


def test_an_exact_copy_is_at_distance_zero() -> None:
    reference = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert closest(reference[3:5], reference).tolist() == [0, 0]


def test_the_scale_of_a_feature_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    asked, reference = torch.randn(5, 8, generator=generator), torch.randn(20, 8, generator=generator)
    factor = torch.tensor([1e4, 1, 1, 1e-3, 1, 1, 1, 1])
    torch.testing.assert_close(closest(asked * factor, reference * factor), closest(asked, reference))


def test_the_interval_covers_the_ratio_and_shrinks_with_more_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    widths = []
    for number in (20, 500):
        values = 1 + torch.rand(2, number, generator=generator, dtype=torch.float64)
        found = distance_ratio(values[0], values[1])
        assert found.low <= found.ratio <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2
    with pytest.raises(ValueError, match="synthetic and of held-out"):
        distance_ratio(torch.zeros(0), torch.ones(3))
