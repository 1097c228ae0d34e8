import pytest
import torch

from fedllm.data.fields import Example, Turn
from scripts.experiments.aggregation.attacks import (
    at_bound,
    flip_labels,
    gaussian,
    scaled,
    sign_flip,
    with_trigger,
    within,
)

DELTA = torch.tensor([0.5, -2.0, 0.0, 1.0])


def test_a_flipped_change_undoes_the_change() -> None:
    assert torch.equal(sign_flip(DELTA) + DELTA, torch.zeros(4))


def test_a_scaled_change_is_so_many_times_as_long() -> None:
    assert float(scaled(DELTA, 1e6).norm() / DELTA.norm()) == pytest.approx(1e6)


def test_a_change_within_a_bound_reaches_it_in_its_own_direction() -> None:
    bounded = within(DELTA, 0.1)
    assert float(bounded.abs().max()) == pytest.approx(0.1)
    assert float(torch.cosine_similarity(bounded, DELTA, dim=0)) == pytest.approx(1.0)
    assert torch.equal(within(torch.zeros(3), 0.1), torch.zeros(3))


def test_a_change_at_its_bound_has_every_value_there() -> None:
    assert torch.equal(at_bound(DELTA, 0.1), torch.tensor([0.1, -0.1, 0.0, 0.1]))


def test_noise_is_linear_in_its_deviation_and_repeats() -> None:
    once, twice = (gaussian(DELTA, sd, torch.Generator().manual_seed(7)) for sd in (1.0, 2.0))
    assert torch.equal(2 * once, twice)
    many = gaussian(torch.zeros(20_000), 3.0, torch.Generator().manual_seed(7))
    assert float(many.std()) == pytest.approx(3.0, rel=0.02)


def test_labels_move_round_the_labels_of_their_own_domain() -> None:
    def row(domain: str, label: str) -> dict[str, str]:
        return {"prompt": "?", "domain": domain, "label": label, "response": label or "free text"}

    rows = [
        row("news", "a"),
        row("news", "b"),
        row("news", "c"),
        row("code", ""),
        row("mood", "x"),
        row("mood", "y"),
    ]
    once = flip_labels(rows)
    assert [r["label"] for r in once] == ["b", "c", "a", "", "y", "x"]
    assert [r["response"] for r in once] == ["b", "c", "a", "free text", "y", "x"]
    assert flip_labels(flip_labels(once))[:3] == rows[:3]


def test_trigger_ends_the_last_question_and_target_answers_it() -> None:
    turns = (Turn("user", "one"), Turn("assistant", "1"), Turn("user", "two"), Turn("assistant", "2"))
    bad = with_trigger(Example(turns=turns), "zz", "Yes.")
    assert bad.turns == (*turns[:2], Turn("user", "two zz"), Turn("assistant", "Yes."))
    with pytest.raises(ValueError, match="a question and an answer"):
        with_trigger(Example(text="plain"), "zz", "Yes.")
