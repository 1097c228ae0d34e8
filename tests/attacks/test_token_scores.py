"""Token scores: one fused pass gives what transformers gives text by text."""

from collections.abc import Callable

import pytest
import torch

from fedllm.attacks.token_scores import no_adapter, score, whole
from fedllm.engine.jobs import EvaluationJob
from fedllm.models.chat import IGNORED, Encoded
from tests.builders import random_texts


def adapters_of(engine, number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [0.2 * torch.randn(engine.layout.size, generator=generator) for _ in range(number)]


def plain(engine, tokens: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        log = engine.base.model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(dim=1)
    law = torch.distributions.Categorical(logits=log)
    means = -law.entropy()
    squares = (law.probs * log**2).sum(dim=1)
    targets = torch.tensor(tokens[1:])
    return (
        log[torch.arange(len(targets)), targets],
        means,
        (squares - means**2).sqrt(),
        log.argmax(dim=1) == targets,
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_scores_are_those_of_the_model_and_its_next_token_law(kind: str, make_engine: Callable) -> None:
    engine = make_engine(kind, "float64")
    texts = random_texts([12, 30, 5])
    (found,) = score(engine, [no_adapter(engine)], [whole(text) for text in texts])
    for text, one in zip(texts, found, strict=True):
        expected = plain(engine, text)
        torch.testing.assert_close(one.log_probs, expected[0])
        torch.testing.assert_close(one.means, expected[1])
        torch.testing.assert_close(one.deviations, expected[2])
        assert torch.equal(one.is_top, expected[3])


def test_scores_under_an_adapter_are_the_engines_losses(make_engine: Callable) -> None:
    engine = make_engine(dtype="float64")
    adapters = adapters_of(engine, 3)
    rows = [Encoded(text, (IGNORED,) * 4 + text[4:]) for text in random_texts([12, 30, 9, 25])]
    found = score(engine, adapters, rows)
    for adapter, scores in zip(adapters, found, strict=True):
        for row, one in zip(rows, scores, strict=True):
            (wanted,) = engine.evaluate([EvaluationJob("a", adapter, (row,))])
            assert len(one.log_probs) == row.num_supervised
            assert -float(one.log_probs.mean()) == pytest.approx(wanted.loss, rel=1e-9)


def test_how_texts_share_passes_changes_nothing(make_engine: Callable) -> None:
    rows = [whole(text) for text in random_texts([40, 8, 300, 21])]
    engines = [make_engine(dtype="float64", budget=budget) for budget in (1, 64, 4096)]
    found = [score(engine, adapters_of(engine, 2), rows) for engine in engines]
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            for one, two in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one.log_probs, two.log_probs)
                torch.testing.assert_close(one.deviations, two.deviations)


def test_a_row_that_learns_nothing_has_no_scores(make_engine: Callable) -> None:
    engine = make_engine()
    ((first, second),) = score(
        engine, [no_adapter(engine)], [Encoded((5, 6, 7), (IGNORED,) * 3), whole((5, 6, 7))]
    )
    assert (len(first.log_probs), len(second.log_probs)) == (0, 2)


def test_the_model_is_left_as_it_was(make_engine: Callable) -> None:
    engine = make_engine()
    before = {name for name, _ in engine.base.model.named_modules()}
    score(engine, adapters_of(engine, 1), [whole(text) for text in random_texts([9])])
    assert {name for name, _ in engine.base.model.named_modules()} == before
