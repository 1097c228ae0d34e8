"""The experiment of forgetting: what its goals judge, and that turns done again are those after the start."""

from collections.abc import Callable
from pathlib import Path

from fedllm.config.run_config import RunConfig
from scripts.experiments.corpus import Corpus, write_rows
from scripts.experiments.forgetting import (
    JUDGED,
    OTHERS,
    SECONDS,
    TURNS,
    Figures,
    do_seed,
    goals_of,
    table_of,
    verdicts_of,
)
from scripts.unlearning.left import EXPOSURE, FOUND, LOSS, MEASURES

# Tiny: what is learnt is next to nothing, and each way is gone all the same.
TINY_FLAT = {
    "model.device": "cpu",
    "lora.rank": 2,
    "lora.alpha": 4.0,
    "lora.target-modules": "q_proj,v_proj",
    "train.local-steps": 2,
    "train.batch-size": 2,
    "train.max-length": 64,
    "train.learning-rate": 0.01,
}


def figures(shift: float) -> Figures:
    """Return made-up figures of a seed: the client shows in `with` and `nothing`, half of it in `ascent`."""
    exposed = {"with": 4.0, "nothing": 4.0, "ascent": 2.0}
    return {
        name: {
            EXPOSURE: exposed.get(name, 1.0) + shift,
            FOUND: 0.1,
            LOSS: 3.0,
            OTHERS: 2.0 + 0.25 * (name == "ascent"),
            TURNS: 4,
            SECONDS: 1.0,
            "same bits as retrained": float(name in ("retrained", "replay")),
        }
        for name in ("with", "retrained", "groups", *JUDGED)
    }


SEEDS = [figures(shift) for shift in (0.0, 0.1, -0.1)]


def test_every_way_of_a_seed_has_its_figures(
    tiny_corpus: Corpus, make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{**row, "client": row["domain"]} for row in tiny_corpus.rows]
    flat = {
        **TINY_FLAT,
        "run.name": "seed-0",
        "run.output": str(tmp_path),
        "model.name": str(make_model_folder()),
        "data.source": str(write_rows(tmp_path / "rows.jsonl", rows)),
        "data.held-out-fraction": 0.4,
        "federation.num-clients": 3,
        "federation.num-rounds": 3,
        "federation.cohort": 2,
        "audit.canaries": "8:4",
        "wire.codec": "fp32",
    }
    found = do_seed(RunConfig.from_flat(flat), "code")
    assert set(found) == {"with", "retrained", "groups", *JUDGED}
    assert found["replay"]["same bits as retrained"] == 1.0
    measured = (*MEASURES, OTHERS)
    assert [found["nothing"][name] for name in measured] == [found["with"][name] for name in measured]
    turns = {name: figures[TURNS] for name, figures in found.items()}
    assert turns["with"] == turns["retrained"] == 6
    assert 0 < turns["replay"] <= 6
    assert turns["nothing"] == 0 < turns["ascent"] == turns["subtraction"] <= 3


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
