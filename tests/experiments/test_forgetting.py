"""The experiment of forgetting: what its goals judge, and that turns done again are those after the start."""

from scripts.experiments.forgetting import (
    JUDGED,
    OTHERS,
    OWN,
    SECONDS,
    TURNS,
    Figures,
    goals_of,
    table_of,
    verdicts_of,
)
from scripts.unlearning.left import EXPOSURE, FOUND


def figures(shift: float) -> Figures:
    """Return made-up figures of a seed: the client shows in `with` and `nothing`, half of it in `ascent`."""
    exposed = {"with": 4.0, "nothing": 4.0, "ascent": 2.0}
    return {
        name: {
            EXPOSURE: exposed.get(name, 1.0) + shift,
            FOUND: 0.1,
            OWN: 3.0,
            OTHERS: 2.0 + 0.25 * (name == "ascent"),
            TURNS: 4,
            SECONDS: 1.0,
            "same bits as retrained": float(name in ("retrained", "replay")),
        }
        for name in ("with", "retrained", "groups", *JUDGED)
    }


SEEDS = [figures(shift) for shift in (0.0, 0.1, -0.1)]


def test_the_goals_are_exactness_power_and_what_ascent_costs() -> None:
    goals = goals_of(SEEDS, verdicts_of(SEEDS))
    assert goals["replay_has_the_bits_of_retraining"].met
    assert goals["exposure_tells_the_client"].met
    assert abs(goals["ascent_share_of_exposure_gone"].value - 2 / 3) < 1e-9
    assert not goals["ascent_costs_others_nats"].met


def test_what_forgets_nothing_is_reported_so() -> None:
    verdicts = verdicts_of(SEEDS)
    said = {name: of[EXPOSURE].in_words for name, of in verdicts.items()}
    assert said["replay"] == "like retraining"
    assert said["ascent"] == said["nothing"] == "unlike retraining"
    assert {of[FOUND].in_words for of in verdicts.values()} == {"not measurable"}
    assert table_of(SEEDS, verdicts).row_count == len(SEEDS[0])
